"""Short runs of the command on images made here."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from offload_sparse.cli.main import main
from offload_sparse.run import trainer
from offload_sparse.workloads.data.parquet import read_parquet


def options(images: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of two epochs in steps of 16 images."""
    return [
        *("train", "--data.name", str(images), "--data.batch_size", "16", "--run_dir", str(run_dir)),
        *("--model.arguments.width", "0.25", "--round.k", "2", "--train.epochs", "2"),
        *("--policy.search", "sampled", "--train.log_every", "2"),
        *("--quiet", "true", *more),
    ]


def train(images: Path, run_dir: Path, *more: str) -> int:
    """Such a run, whose network is not checked; its exit code."""
    torch.manual_seed(torch.seed())  # a new process has a generator of its own
    return main(options(images, run_dir, "--train.check", "false", "--train.log_every", "4", *more))


def interrupted(
    step: int, images: Path, run_dir: Path, *more: str, number: int = signal.SIGTERM
) -> int:
    """``train``, which gets a signal while it does this step."""
    original = trainer.Run.train_step

    def train_step(run: trainer.Run, at: int, batch: Any) -> None:
        if at == step:
            signal.raise_signal(number)
        original(run, at, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "train_step", train_step)
        return train(images, run_dir, *more)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_classes(images: Path, folder: Path, *names: str) -> Path:
    """The same images, in parquet files in ``folder``, with other names of their classes."""
    for path in images.glob("*.parquet"):
        table = read_parquet([path]).cast_column("label", datasets.ClassLabel(names=list(names)))
        table.to_parquet(folder / path.name)
    return folder


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[Any]:
    """The loss is NaN at these calls. Returns the labels of every batch that was trained on."""
    original, seen = trainer.classification_loss, []

    def loss(module: Any, batch: Any, **settings: Any) -> Any:
        seen.append(batch.labels)
        value, scalars = original(module, batch, **settings)
        return (value * float("nan") if len(seen) - 1 in calls else value), scalars

    monkeypatch.setattr(trainer, "classification_loss", loss)
    return seen
