"""Decoded images in memory-mapped files, built once and read by every later run.

    <data.cache>/<key of the images and of how they are decoded>/00000.safetensors, 00001.safetensors, …
        pixels  uint8[n, C, H, W]
        shown   int64[n], which image each row holds: another one where a row cannot be decoded
        sides   int64[n, 2], height and width of the images as they were stored

A file is there as a whole or not at all, so that a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from offload_sparse.channels.require import Explained
from offload_sparse.workloads.data.corrupt import Corrupt
from offload_sparse.workloads.data.parquet import ParquetStream, file_state
from offload_sparse.workloads.data.source import Split

WriteFile = Callable[[Path, bytes], None]
"""Writes a file that is whole or not there, whatever happens."""

_FILE_BYTES = 128 << 20
_CHUNK = 64


class Decoded(NamedTuple):
    """Images as they go into a batch.

    Attributes:
        pixels: uint8[b, channels, height, width].
        indices: int64[b], the images that these are: where one is corrupt, the one in its place.
        sides: int64[b, 2], their height and width as they are stored; empty where nobody asks.
        parts: int64[b, 4], what is still to be cut out of each (``augmentation.cut``); None for nothing."""

    pixels: Tensor
    indices: Tensor
    corrupt: tuple[Corrupt, ...] = ()
    sides: Tensor = torch.empty(0)
    parts: Tensor | None = None


Decode = Callable[[Tensor], Decoded]
"""The images at these indices int64[n]; several threads may call it at once."""


class PixelCache:
    """The rows of a split, by index, read from the files below ``folder``; those that are missing are built.
    Raises ValueError: a file of the cache cannot be read or written.

    Args:
        recipe: what the pixels depend on beside the images themselves.
        row_bytes: bytes of a decoded image.
        decode, write: decodes some images, writes a file.
        progress: draw a bar while building.

    Attributes:
        shown, sides, corrupt: ``indices``, ``sides`` and ``corrupt`` of ``Decoded``, of the whole split."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        recipe: str,
        row_bytes: int,
        decode: Decode,
        write: WriteFile,
        progress: bool,
    ) -> None:
        self._rows_per_file = max(1, _FILE_BYTES // row_bytes)
        folder = folder / _key(split, f"{recipe} {self._rows_per_file}")
        parts = torch.arange(len(split)).split(self._rows_per_file)
        files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
        with Explained(f"data.cache {folder} cannot be used (", "); remove it, or give another"):
            if not all(file.is_file() for file in files):  # else nothing need be written
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "lock", "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait, and find the files
                    _build(dict(zip(files, parts, strict=True)), split.name, decode, write, progress)
            read = [_read(file) for file in files]
        self._pixels = [rows.pixels for rows in read]
        self.shown = torch.cat([rows.indices for rows in read])
        self.sides = torch.cat([rows.sides for rows in read])
        self.corrupt = tuple(image for rows in read for image in rows.corrupt)

    def gather(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` int64[b], uint8[b, C, H, W]."""
        out = torch.empty(len(indices), *self._pixels[0].shape[1:], dtype=torch.uint8)
        for row, index in zip(out, indices.tolist(), strict=True):
            row.copy_(self._pixels[index // self._rows_per_file][index % self._rows_per_file])
        return out


def _build(parts: dict[Path, Tensor], name: str, decode: Decode, write: WriteFile, progress: bool) -> None:
    missing = {file: rows for file, rows in parts.items() if not file.is_file()}
    total = sum(map(len, missing.values()))
    disable = None if progress else True  # None draws it on a terminal only
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc=f"decoding {name} into data.cache", disable=disable, leave=False) as bar,
    ):
        for file, indices in missing.items():
            chunks = []
            for chunk in pool.map(decode, indices.split(_CHUNK)):
                chunks.append(chunk)
                bar.update(len(chunk.indices))
            pixels, shown, corrupt, sides, _ = zip(*chunks, strict=True)
            tensors = {"pixels": torch.cat(pixels), "shown": torch.cat(shown), "sides": torch.cat(sides)}
            found = json.dumps([list(image) for images in corrupt for image in images])
            write(file, safetensors.torch.save(tensors, {"corrupt": found}))


def _read(file: Path) -> Decoded:
    """A file's rows, whose pixels are read from the disk when they are used."""
    with safetensors.safe_open(file, "pt") as content:
        pixels, shown, sides = (content.get_tensor(name) for name in ("pixels", "shown", "sides"))
        corrupt = tuple(Corrupt(*image) for image in json.loads(content.metadata()["corrupt"]))
    if pixels.dtype != torch.uint8 or not len(pixels) == len(shown) == len(sides):
        raise ValueError(f"{file.name} does not hold what its name says")
    return Decoded(pixels, shown, corrupt, sides)


def _key(split: Split, recipe: str) -> str:
    """Which images these are, in which order, and how they are decoded."""
    digest = hashlib.sha256(f"{split.name} {split.channels} {len(split)} {recipe}".encode())
    table = split.table
    if isinstance(table, ParquetStream):
        digest.update(table.identity)
    else:
        digest.update(table._fingerprint.encode())
        for image in table["image"] if "path" in str(table.features) else ():
            if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
                # Where there is no such file, it is counted when it is decoded.
                digest.update(np.array(file_state(image["path"]) or (-1, -1)).tobytes())
    return digest.hexdigest()[:24]
