"""Small data sets written to disk, for the tests of this room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image

from offload_sparse.workloads.data.loader import Batch

Pixels = npt.NDArray[np.uint8]


def pixels(count: int, height: int = 8, width: int = 8, channels: int = 1, seed: int = 0) -> list[Pixels]:
    """``count`` random images, uint8[H, W] when grey, uint8[H, W, 3] else."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return [
        np.random.default_rng((seed, number)).integers(0, 256, shape, dtype=np.uint8)
        for number in range(count)
    ]


def png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def table(
    images: Sequence[Pixels], labels: Sequence[Any], names: Sequence[str] | None = None
) -> datasets.Dataset:
    """Columns ``image`` (the Image feature) and ``label`` (a ClassLabel if names are given)."""
    features = None
    if names is not None:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        )
    rows = {"image": [{"bytes": png(image), "path": None} for image in images], "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(path: Path, dataset: datasets.Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(dataset.data.table, path)
    return path


def assert_equal(got: Sequence[Batch], expected: Sequence[Batch]) -> None:
    """The same images and labels, batch by batch."""
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def parquet_folder(folder: Path, train: int = 12, test: int = 6, channels: int = 1, side: int = 8) -> Path:
    """``train.parquet`` and ``test.parquet`` of random images in three classes."""
    for split, count, seed in (("train", train, 0), ("test", test, 1)):
        images = pixels(count, side, side, channels, seed)
        write_parquet(
            folder / f"{split}.parquet", table(images, [i % 3 for i in range(count)], ("a", "b", "c"))
        )
    return folder
