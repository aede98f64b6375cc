"""What benches that train many small networks share: decoded images, batches, and results that are kept.

A bench is a table of cells. Every finished cell is one JSON file, so that a bench can be interrupted and
carried on, and cells of an earlier run are not run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.augmentation import augment, draw
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.loader import Batch
from offload_sparse.workloads.data.normalise import Normalise, normalise_for
from offload_sparse.workloads.data.order import global_batch, steps_per_epoch
from offload_sparse.workloads.data.source import Split, load_splits


@dataclass(frozen=True)
class Images:
    """A data set, decoded: pixels uint8[N, C, H, W] and labels int64[N] of both splits."""

    name: str
    train: Batch
    test: Batch
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def read_images(config: DataConfig, held_out: bool = False) -> tuple[Images, Normalise]:
    """The images of ``config`` and their normalisation.

    Args:
        config: what to read.
        held_out: ``test`` is the validation split of ``config``, and the test images stay unread.
    """
    splits = load_splits(config)
    tested = splits.validation if held_out else splits.test
    assert tested is not None, "a validation split was asked for"
    shown = ImageSet(splits.train, config)
    images = Images(config.name, _decoded(shown), _decoded_split(tested, config), splits.num_classes)
    return images, normalise_for(shown, config)


def batches(
    images: Images, batch_size: int, seed: int, steps: int, padding: int = 0, flip: bool = False
) -> Iterator[Batch]:
    """The training batches of a run, augmented as ``data.random_crop`` and ``data.random_flip`` say: uint8
    pixels and labels, on the CPU.
    """
    count = len(images.train.labels)
    per_epoch = steps_per_epoch(count, batch_size)
    for step in range(steps):
        epoch, within = divmod(step, per_epoch)
        chosen = global_batch(seed, epoch, within, count, batch_size)
        pixels = images.train.images[chosen]
        if padding or flip:
            pixels = augment(pixels, draw(seed, epoch, chosen, padding), padding, flip)
        yield Batch(pixels, images.train.labels[chosen])


def on_device(batch: Batch, normalise: Normalise) -> Batch:
    """Normalised pixels and labels, where ``normalise`` lives."""
    pixels = normalise(batch.images)
    return Batch(pixels, batch.labels.to(pixels.device))


def in_parts(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, ``size`` at a time."""
    return zip(batch.images.split(size), batch.labels.split(size), strict=True)


def kept(folder: str, file_name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a cell: those in ``folder`` if it has them, else those of ``run``, which it then has.

    Args:
        folder: where figures are kept; empty keeps none.
        file_name: names everything that the figures depend on.
        run: runs the cell.
    """
    if not folder:
        return run()
    path = Path(folder) / file_name
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    figures = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    return figures


def spread(values: Sequence[float]) -> float:
    """Standard deviation over runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def _decoded_split(split: Split, config: DataConfig) -> Batch:
    return _decoded(ImageSet(split, config))


def _decoded(images: ImageSet) -> Batch:
    return Batch(images.gather(torch.arange(len(images))), images.labels)
