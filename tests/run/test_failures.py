"""What a run says, and leaves, when it cannot go on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.cli.main import main
from offload_sparse.engine.faults import PHASES
from offload_sparse.run import trainer
from tests.run import killed_run


def test_a_device_too_small_is_one_line_with_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No device here is too small; the error is raised by hand."""

    def too_large(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(trainer.Run, "train_step", too_large)
    assert main(["train", *killed_run.OPTIONS, "--run_dir", str(tmp_path / "run")]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert "out of device memory; by the plan policy.rho is at most 1.0 (it is 0.25)" in line
    assert "data.batch_size at most 8 (it is 8)" in line


def test_a_rank_that_dies_is_one_line_on_the_other_and_ends_the_job(tmp_path: Path) -> None:
    fault = "kill:rank=1:step=5:phase=step"
    codes, log = killed_run.run(tmp_path, "run", 2, ["--train.timeout", "30"], fault)
    assert codes == [1, -signal.SIGKILL], log
    errors = [line for line in log.splitlines() if line.startswith("offload-sparse: error:")]
    assert len(errors) == 1, log
    assert "another rank has died" in errors[0]
    assert "Traceback" not in log


def test_a_part_of_the_store_that_one_rank_lacks_is_one_line(tmp_path: Path) -> None:
    """As on a node whose disk is not mounted; every rank knows why."""
    more = ["--train.timeout", "60", "--store.tier", "file"]
    codes, log = killed_run.run(tmp_path, "run", 2, more, "kill:rank=1:step=5:phase=step")
    assert codes == [1, -signal.SIGKILL], log
    (tmp_path / "run_run" / "store" / "rank1" / "weights.bin").unlink()
    codes, log = killed_run.run(tmp_path, "run", 2, more)
    assert codes == [2, 2], log
    (error,) = [line for line in log.splitlines() if "error:" in line]
    assert error.startswith("offload-sparse: error: rank 1: ")
    assert "store/rank1/weights.bin does not hold" in error


@pytest.mark.parametrize(
    "phase", [p if p == "step" else pytest.param(p, marks=pytest.mark.slow) for p in PHASES]
)
def test_a_rank_that_hangs_is_given_up_after_the_time_limit(phase: str, tmp_path: Path) -> None:
    """Wherever it does; a checkpoint is committed by the first rank."""
    hanging = 0 if phase == "checkpoint-commit" else 1
    fault = f"hang:rank={hanging}:step=5:phase={phase}"
    more = ["--train.timeout", "5"]
    codes, log = killed_run.run(tmp_path, "run", 2, more, fault, hanging=hanging)
    assert codes[1 - hanging] == 1, log
    assert codes[hanging] == -signal.SIGKILL, log
    errors = [line for line in log.splitlines() if line.startswith("offload-sparse: error:")]
    assert len(errors) == 1, log
    assert "has not answered within train.timeout (5 s)" in errors[0]
    assert "Traceback" not in log


def test_runs_of_one_seed_repeat_each_other_with_dropout(tmp_path: Path) -> None:
    """torch's generator is a function of the seed: two runs, and another one of another seed."""
    networks = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        more = ["--train.seed", seed]
        codes, log = killed_run.run(tmp_path, name, 1, more)
        assert codes == [0], log
        networks.append(killed_run.left(tmp_path, name, 1)[0]["tensors"])
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert not torch.equal(networks[0]["s"], networks[2]["s"])
