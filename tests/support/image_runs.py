"""Short runs of the command on images made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_sparse.run import trainer


def options(images: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of two epochs in steps of 16 images."""
    return [
        *("train", "--data.name", str(images), "--data.batch_size", "16", "--run_dir", str(run_dir)),
        *("--model.arguments.width", "0.25", "--round.k", "2", "--train.epochs", "2"),
        *("--policy.search", "sampled", "--train.log_every", "2"),
        *("--quiet", "true", *more),
    ]


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[Any]:
    """The loss is NaN at these calls. Returns the labels of every batch that was trained on."""
    original, seen = trainer.classification_loss, []

    def loss(module: Any, batch: Any, label_smoothing: float = 0.0) -> Any:
        seen.append(batch.labels)
        value, scalars = original(module, batch, label_smoothing)
        return (value * float("nan") if len(seen) - 1 in calls else value), scalars

    monkeypatch.setattr(trainer, "classification_loss", loss)
    return seen
