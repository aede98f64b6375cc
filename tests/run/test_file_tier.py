"""A run with its store in files that is killed in a round is carried on by the same command, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.engine.faults import VARIABLE
from tests.support.launches import SMALL, two_ranks
from tests.support.run_folder import digest, losses

OPTIONS = [*SMALL, "--train.max_steps", "9", "--train.log_every", "1", "--store.tier", "file"]
OPTIONS += ["--round.freeze_at", "0.67"]  # rounds end at steps 3, 6 and 9
LIMIT = 240
"""Seconds until a process that hangs is stopped."""


def one_rank(options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offload_sparse.cli", "train", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


def assert_same_end(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    assert digest(a) == digest(b), "every weight, slot and statistic of the store"
    networks = [load_pruned(folder / "model").state_dict() for folder in (a, b)]
    assert networks[0].keys() == networks[1].keys()
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name
    summaries: list[dict[str, Any]] = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6])
def test_a_run_killed_in_a_scatter_ends_like_one_that_was_not(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the search for channels (which may begin again) and at its end, with kill -9."""
    straight = one_rank([*OPTIONS, "--run_dir", str(tmp_path / "straight")])
    assert straight.returncode == 0, straight.stderr
    parts = [*OPTIONS, "--run_dir", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"kill:step={step}:phase=scatter")
        assert one_rank(parts).returncode == -signal.SIGKILL
    assert not (tmp_path / "parts" / "summary.json").exists()
    again = one_rank(parts)
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {step} from its own store" in again.stderr
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
def test_after_a_kill_in_a_scatter_the_same_command_resumes(tmp_path: Path) -> None:
    """Two ranks, each with files of its own; one dies after both have logged the round."""
    assert two_ranks([*OPTIONS, "--run_dir", str(tmp_path / "straight")], port=29641).returncode == 0
    parts = [*OPTIONS, "--run_dir", str(tmp_path / "parts")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "kill:rank=1:step=6:phase=scatter")
        assert two_ranks(parts, port=29642).returncode != 0
    again = two_ranks(parts, port=29643)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 6 from its own store" in again.stderr
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
