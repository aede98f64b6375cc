"""Launches whose ranks would not find each other are refused before anything slow happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from offload_sparse.config.run import RunConfig, TrainConfig, resolve
from offload_sparse.engine.config import RoundConfig
from offload_sparse.run.launch import _in_one_line, _leave_word, as_launched, check_environment, launched
from offload_sparse.run.process import SEGMENTS, SEGMENTS_BEFORE, grow_segments
from tests.support.ranks import run_ranks

RENDEZVOUS = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", **RENDEZVOUS}])
def test_one_process_and_complete_rendezvous_are_accepted(environment: dict[str, str]) -> None:
    check_environment(environment)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "ACCELERATE_USE_CPU=true accelerate launch"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "accelerate launch per node"),
        ({"PMI_SIZE": "2"}, "accelerate launch per node"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "accelerate launch per node"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_ranks_that_cannot_find_each_other_are_told_what_to_run(
    environment: dict[str, str], advice: str
) -> None:
    with pytest.raises(ValueError, match=advice) as error:
        check_environment(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [None, SEGMENTS, SEGMENTS_BEFORE])
def test_device_memory_grows_in_segments_unless_the_user_says_otherwise(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of two names: torch reads one variable and passes over the other."""
    monkeypatch.delenv(SEGMENTS, raising=False)
    monkeypatch.delenv(SEGMENTS_BEFORE, raising=False)
    expected = {SEGMENTS: "expandable_segments:True"}
    if name is not None:
        expected = {name: "backend:native"}
        monkeypatch.setenv(name, "backend:native")
    grow_segments()
    assert {n: os.environ[n] for n in (SEGMENTS, SEGMENTS_BEFORE) if n in os.environ} == expected


# --- what accelerate launch was told -----------------------------------------------------------------


def test_precision_and_compilation_are_adopted() -> None:
    told = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    config = as_launched(RunConfig(), told, [])
    assert (config.train.precision, config.compile) == ("bf16", True)
    same = RunConfig(train=TrainConfig(precision="bf16"))
    assert as_launched(same, {"ACCELERATE_MIXED_PRECISION": "bf16"}, []) == same


def test_the_launchers_defaults_leave_the_configuration_as_it_is() -> None:
    told = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    launcher = ["accelerate", "launch", "--gradient_accumulation_steps", "1", "launch/train.py"]
    for config in (RunConfig(), RunConfig(compile=True, train=TrainConfig(precision="bf16"))):
        assert as_launched(config, told, launcher) == config


@pytest.mark.parametrize(
    ("told", "launcher", "advice"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "train.precision is bf16; leave one of them out"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "--mixed_precision fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, [], "--dynamo_backend eager"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "--use_deepspeed, .* a run spreads its weights"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "take a --config_file of launch/"),
        ({}, ["accelerate", "launch", "--gradient_accumulation_steps", "4"], "steps 4, but a step of a run"),
        ({}, ["accelerate", "launch", "--gradient-accumulation-steps=4"], "set data.batch_size"),
    ],
)
def test_what_a_run_cannot_do_is_refused(told: dict[str, str], launcher: list[str], advice: str) -> None:
    with pytest.raises(ValueError, match=advice) as error:
        as_launched(RunConfig(train=TrainConfig(precision="bf16")), told, launcher)
    assert "\n" not in str(error.value)


def test_runs_of_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    for precision in ("bf16", "no"):
        config = RunConfig(run_dir=tmp_path, trackers=[], train=TrainConfig(precision=precision))  # type: ignore[arg-type]
        with launched(config) as accelerator:
            assert accelerator.mixed_precision == precision


# --- auto --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "transfer"), [("cpu", "delta"), ("cuda", "overlap")])
def test_auto_is_resolved_once_and_nothing_else_changes(device: str, transfer: str) -> None:
    config = resolve(RunConfig(), device)
    assert (config.policy.sampler, config.policy.estimator) == ("persistent", "rloo")
    assert (config.policy.parametrisation, config.round.transfer) == ("group", transfer)
    assert resolve(config, device) == config
    for subnets, once in (("shared", "overlap"), ("references", "overlap"), ("per_rank", "full")):
        rounds = RoundConfig(sync="round", reference="every_step", subnets=subnets)  # type: ignore[arg-type]
        assert resolve(RunConfig(round=rounds), device).round.transfer == once
    chosen = RunConfig()
    chosen.round.transfer, chosen.store.pin = "full", "on"
    assert (resolve(chosen, device).round.transfer, resolve(chosen, device).store.pin) == ("full", "on")


def what_is_seen_of_the_second_rank(says: str) -> str:
    if says and dist.get_rank() == 1:
        _leave_word(ValueError(says))
    dist.barrier()
    return _in_one_line(RuntimeError("Connection closed by peer"), RunConfig())


def test_a_rank_that_ends_alone_leaves_the_others_its_word() -> None:
    """Without one, all that they know is that it is gone."""
    assert run_ranks(2, what_is_seen_of_the_second_rank, "no disk is\nthere")[0] == "rank 1: no disk is there"
    assert run_ranks(2, what_is_seen_of_the_second_rank, "")[0].startswith("another rank has died")
