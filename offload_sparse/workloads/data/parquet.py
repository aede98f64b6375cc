"""Parquet files: which belong to a split, read as a whole or, without a copy in a cache, where they lie.

Where they lie, only the footers and the label column are read at the start. Images are fetched by row number,
so that every rank can read its part of the same global batch; what makes that a stream is the order:

    row groups in a random order  →  their rows in a line  →  each window of ``shuffle_buffer`` rows
    shuffled

A reader holds the row groups that one window touches, and reads every row group once per epoch. Each worker
process of each rank does so for itself: cheap on a local disk, costly over a network.
"""

from __future__ import annotations

import copy
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.table import InMemoryTable
from torch import Tensor

from offload_sparse.channels.require import Explained
from offload_sparse.workloads.data.decode import Stored, stored_image
from offload_sparse.workloads.data.order import seed_of

# Files up to this size are read into memory: no cache has to be written, so a read-only home folder does no
# harm.
IN_MEMORY_BYTES = 512 << 20

_SHARD = re.compile(r"[-_.]\d+(-of-\d+)?$")
_USUAL_SPLITS = ("train", "test", "validation")
_FILES_AT_ONCE = 16


def split_names(folder: Path, suffix: str = ".parquet") -> list[str]:
    """Names of the splits in a folder of files: file names without what numbers their shards."""
    stems = [path.stem for path in folder.glob(f"*{suffix}")]
    usual = {split for split in _USUAL_SPLITS if any(stem.startswith(split) for stem in stems)}
    return sorted({_SHARD.sub("", stem) for stem in stems} | usual)


def split_files(folder: Path, split: str, suffix: str = ".parquet") -> list[Path]:
    """The files of a split, in order: ``train.parquet``, else ``train-00000-of-00002.parquet`` …, else
    ``train*.parquet``."""
    files = sorted(path for path in folder.glob(f"*{suffix}") if path.stem.startswith(split))
    exact = [path for path in files if path.stem == split]
    shards = [path for path in files if _SHARD.fullmatch(path.stem[len(split) :])]
    return exact or shards or files


def read_parquet(files: Sequence[Path]) -> datasets.Dataset:
    """The rows of ``files``, one after the other.

    Small files are read into memory. Large ones go through the library, which converts them once to
    memory-mapped Arrow files in its cache (``HF_DATASETS_CACHE``). Raises ValueError: a file is no parquet
    file, the files differ in their columns, or the cache cannot be written."""
    with _reading(files[0]):
        if sum(path.stat().st_size for path in files) <= IN_MEMORY_BYTES:
            tables = [datasets.Dataset(InMemoryTable(pq.read_table(path))) for path in files]
            return datasets.concatenate_datasets(tables)
        return datasets.load_dataset("parquet", data_files=[str(path) for path in files], split="train")


class ParquetStream:
    """The rows of parquet files (paths or fsspec addresses, ``hf://…``) in their order, with the images left
    in ``column`` of the files; ``window`` rows are shuffled together. Raises ValueError: a file cannot be
    read, or the files differ in their columns."""

    def __init__(self, files: Sequence[str], window: int, column: str) -> None:
        self._files = tuple(files)
        self._window = window
        self._metadata = _in_parallel(pq.read_metadata, self._files)
        schema = self._metadata[0].schema.to_arrow_schema()
        for file, metadata in zip(self._files, self._metadata, strict=True):
            if not metadata.schema.to_arrow_schema().equals(schema):
                raise ValueError(f"{file} has other columns than {self._files[0]}; correct data.name")
        self.column_names = schema.names
        self.features = datasets.Features.from_arrow_schema(schema)
        self._groups = [(f, g) for f, m in enumerate(self._metadata) for g in range(m.num_row_groups)]
        sizes = [self._metadata[f].row_group(g).num_rows for f, g in self._groups]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._index = np.arange(sum(sizes), dtype=np.int64)
        self._column = column
        self._kept_rows = window + 2 * max(sizes, default=0)
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def identity(self) -> bytes:
        """The files, as they are now, and the rows."""
        states = [(file, *file_state(file)) for file in self._files]
        return repr((states, self._column)).encode() + self._index.tobytes()

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column; for labels, not for images."""
        parts = _in_parallel(lambda handle: pq.read_table(handle, columns=[name]).column(name), self._files)
        whole = pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)
        return whole if len(whole) == len(self) else whole.take(pa.array(self._index))

    def select(self, indices: np.ndarray[Any, Any]) -> ParquetStream:
        """The rows at ``indices`` int64[n]."""
        part = copy.copy(self)
        part._index, part._cache = self._index[indices], OrderedDict()
        return part

    def images(self, indices: Sequence[int]) -> list[Stored]:
        """The undecoded images at ``indices``, as the library's Image feature stores them."""
        rows = self._index[np.asarray(indices, dtype=np.int64)]
        groups = self._group_of(rows)
        found: list[Stored] = [None] * len(rows)
        # In the order of the row groups, so that a batch reads each of them once at most.
        for position in np.argsort(groups, kind="stable").tolist():
            group = int(groups[position])
            start = int(self._ends[group - 1]) if group else 0
            found[position] = stored_image(self._read_group(group)[int(rows[position]) - start].as_py())
        return found

    def order(self, seed: int, epoch: int) -> Tensor:
        """int64[N]: in what order the rows are read in ``epoch``, a permutation that depends on nothing
        else than the seed."""
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, 2))
        place = torch.randperm(len(self._groups), generator=generator)
        line = place[torch.from_numpy(self._group_of(self._index))].argsort(stable=True)
        windows = torch.arange(len(line)) // self._window
        keys = windows + torch.rand(len(line), generator=generator, dtype=torch.float64)
        return line[keys.argsort(stable=True)]

    def _group_of(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.searchsorted(self._ends, rows, side="right")

    def _read_group(self, group: int) -> pa.Array:
        if group not in self._cache:
            file, number = self._groups[group]
            with _reading(self._files[file]), fsspec.open(self._files[file], "rb") as handle:
                source = pq.ParquetFile(handle, metadata=self._metadata[file])
                table = source.read_row_group(number, columns=[self._column])
            held = sum(len(rows) for rows in self._cache.values()) + len(table)
            while self._cache and held > self._kept_rows:
                held -= len(self._cache.popitem(last=False)[1])
            self._cache[group] = table.column(self._column).combine_chunks()
        self._cache.move_to_end(group)
        return self._cache[group]


def hub_files(name: str) -> dict[str, list[str]]:
    """Addresses of a hub data set's parquet files, by split. Raises ValueError: the data set is not stored as
    parquet files."""
    builder = datasets.load_dataset_builder(name)
    files = {str(split): [str(file) for file in found] for split, found in builder.config.data_files.items()}
    if not files or not all(file.endswith(".parquet") for found in files.values() for file in found):
        raise ValueError(f"{name!r} is not stored as parquet files; set data.streaming to false")
    return files


def _in_parallel(read: Callable[[BinaryIO], Any], files: Sequence[str]) -> list[Any]:
    """What ``read`` finds in each of the files."""

    def opened(file: str) -> Any:
        with _reading(file), fsspec.open(file, "rb") as handle:
            return read(handle)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(opened, files))


def _reading(file: str | Path) -> Explained:
    return Explained(f"{file} cannot be read as a parquet file (", "); correct data.name")


def file_state(file: str | bytes) -> tuple[int, ...]:
    """Size and time of change of a file on this machine; empty for other addresses, and where there is no
    file."""
    if not os.path.exists(file):
        return ()
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns

