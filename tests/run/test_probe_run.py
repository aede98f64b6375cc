"""A run that searches by probes compares its widths on many of the batches that it has trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.workloads.data.loader import Batch, TrainLoader
from tests.support.image_runs import options

BOUNDARY = 24


def search(images: Path, run_dir: Path, *more: str) -> int:
    """A run with one probe, before step ``BOUNDARY``."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sizes = "{stream: 12, hidden: 24, depth: 1}"
    network = ("--model.name", "offload_sparse/mlp", "--model.arguments", sizes)
    policy = ("--policy.search", "probe", "--policy.rho", "0.4", "--round.freeze_at", "0.4")
    given = (*network, *policy, "--train.max_steps", "60", "--trackers", "[]", "--train.check", "false")
    command = [o for o in options(images, run_dir) if o not in ("--model.arguments.width", "0.25")]
    return main([*command, *given, *more])


def test_a_probe_reads_batches_once_more_and_so_does_a_resumed_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    at = TrainLoader.at

    def watched(self: TrainLoader, steps: Sequence[int]) -> Iterator[Batch]:
        read.append(list(steps))
        return at(self, steps)

    monkeypatch.setattr(TrainLoader, "at", watched)
    assert search(images, tmp_path / "run", "--checkpoint.keep", "99") == 0
    assert read == [list(range(BOUNDARY))]
    checkpoint = min((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert search(images, tmp_path / "resumed", "--resume", str(checkpoint)) == 0
    step = int(checkpoint.name.removeprefix("step_"))
    assert 4 <= step <= BOUNDARY
    recalled, probed = read[1:]
    assert (recalled, probed) == (list(range(step - 4, step)), list(range(BOUNDARY)))
    mine, theirs = (load_pruned(tmp_path / run / "model").state_dict() for run in ("run", "resumed"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
