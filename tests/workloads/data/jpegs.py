"""The same small photographs, written as every kind of source that a run can read."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("ant", "bee", "cat")
MODES = ("RGB", "RGB", "L", "CMYK", "RGB", "RGBA", "RGB")
BROKEN = {"truncated": 4, "no image": 9}
"""Which training images cannot be decoded, in a source that has such."""

Encoded = tuple[str, int, bytes]
"""(name, label, bytes of the file)."""


def photograph(number: int) -> Image.Image:
    """Smooth colours, in a size and a mode of its own."""
    generator = np.random.default_rng(number)
    width, height = (int(side) for side in generator.integers(24, 90, 2))
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(MODES[number % len(MODES)])


def encoded(number: int) -> tuple[str, bytes]:
    """File name and bytes: JPEG, or PNG where there is an alpha channel."""
    image, buffer = photograph(number), io.BytesIO()
    kind = "PNG" if image.mode == "RGBA" else "JPEG"
    image.save(buffer, kind, quality=90)
    return f"{number:04d}.{'png' if kind == 'PNG' else 'jpg'}", buffer.getvalue()


def images_of(split: str, count: int, broken: bool) -> list[Encoded]:
    """``count`` images sorted by class, as a folder would give them."""
    first = 0 if split == "train" else 1000
    found = []
    for row in range(count):
        name, content = encoded(first + row)
        if broken and split == "train" and row == BROKEN["truncated"]:
            content = content[: len(content) // 2]
        if broken and split == "train" and row == BROKEN["no image"]:
            content = b"<html>404</html>"
        found.append((name, row * len(CLASSES) // count, content))
    return found


def write_folder(folder: Path, train: int = 24, test: int = 9, broken: bool = False) -> Path:
    """``<split>/<class>/<image>``, with a file that is no image and says so."""
    for split, count in (("train", train), ("test", test)):
        for name, label, content in images_of(split, count, broken):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        (folder / split / CLASSES[0] / "README.txt").write_text("these are ants")
    return folder


def write_shards(
    folder: Path, train: int = 24, test: int = 9, broken: bool = False, rows_per_group: int = 3
) -> Path:
    """Three parquet files per split in the layout of ``imagenet-1k``: ``image``, ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        images = images_of(split, count, broken)
        share = -(-count // 3)
        for shard in range(3):
            path = folder / f"{split}-{shard:05d}-of-00003.parquet"
            part = as_dataset(images[shard * share : (shard + 1) * share])
            pq.write_table(part.data.table, path, row_group_size=rows_per_group)
    return folder


def as_dataset(images: list[Encoded]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"bytes": content, "path": name} for name, _, content in images],
        "label": [label for _, label, _ in images],
    }
    return datasets.Dataset.from_dict(rows, features=features)
