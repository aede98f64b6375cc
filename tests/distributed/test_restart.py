"""Launches that lose a rank or are asked to stop, and carry on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.engine.faults import VARIABLE
from tests.support.launches import SMALL, launch, two_ranks

OPTIONS = [*SMALL, "--train.max_steps", "9", "--train.log_every", "1"]
OPTIONS += ["--round.freeze_at", "0.67"]  # rounds end at steps 3, 6 and 9
ONCE = ["--round.sync", "round", "--optim.warmup_epochs", "0"]
LOCAL = [*ONCE, "--round.subnets", "per_rank"]
IN_FILES = [*ONCE, "--round.reference", "every_step", "--store.tier", "file"]


def losses(run_dir: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rank=1:step=6:phase=checkpoint-write", "step=6:phase=checkpoint-commit"])
def test_a_killed_rank_ends_the_job_and_the_next_launch_carries_on(fault: str, tmp_path: Path) -> None:
    """Two ranks, kill -9 while the second checkpoint is written; the first one is used."""
    options = [*OPTIONS, "--checkpoint.every", "3"]
    assert two_ranks([*options, "--run_dir", str(tmp_path / "straight")], port=29631).returncode == 0
    parts = [*options, "--run_dir", str(tmp_path / "parts")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"kill:{fault}")
        assert two_ranks(parts, port=29632).returncode != 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    again = two_ranks(parts, port=29633)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 3" in again.stderr
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    networks = [load_pruned(tmp_path / name / "model").state_dict() for name in ("straight", "parts")]
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], LOCAL, IN_FILES], ids=["step", "per_rank", "round in files"])
def test_a_launcher_restarts_its_ranks_to_the_same_end(more: list[str], tmp_path: Path) -> None:
    """Three kills of two ranks, in a gather, a scatter and a checkpoint; ``--max_restarts 3``. Checkpoints of
    ranks that talk once per round wait for the end of one.
    """
    options = [*OPTIONS, *more, "--checkpoint.every", "3" if not more else "2"]
    assert two_ranks([*options, "--run_dir", str(tmp_path / "straight")], port=29634).returncode == 0
    deaths = ("rank=1:step=2:phase=gather", "step=4:phase=scatter", "step=6:phase=checkpoint-commit")
    faults = ",".join(f"kill:{death}:restart={attempt}" for attempt, death in enumerate(deaths))
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "29635", "--max_restarts", "3"]
    parts = [*options, "--run_dir", str(tmp_path / "parts")]
    result = launch(parts, launcher, ACCELERATE_USE_CPU="true", **{VARIABLE: faults})
    assert result.returncode == 0, result.stderr
    # After two of them all rounds are in the files, and nothing is left to be saved.
    assert result.stderr.count("dies at step") == (2 if more is IN_FILES else 3)
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    networks = [tmp_path / name / "model" / "weights.safetensors" for name in ("straight", "parts")]
    assert networks[0].read_bytes() == networks[1].read_bytes()
