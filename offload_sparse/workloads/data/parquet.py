"""Parquet files: which belong to a split, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

# Files up to this size are read into memory: no cache has to be written, so a read-only home folder does no
# harm.
IN_MEMORY_BYTES = 512 << 20

_SHARD = re.compile(r"[-_.]\d+(-of-\d+)?$")
_USUAL_SPLITS = ("train", "test", "validation")


def split_names(folder: Path) -> list[str]:
    """Names of the splits in a folder of parquet files: file names without what numbers their shards."""
    stems = [path.stem for path in folder.glob("*.parquet")]
    usual = {split for split in _USUAL_SPLITS if any(stem.startswith(split) for stem in stems)}
    return sorted({_SHARD.sub("", stem) for stem in stems} | usual)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order: ``train.parquet``, else ``train-00000-of-00002.parquet`` …, else
    ``train*.parquet``."""
    files = sorted(path for path in folder.glob("*.parquet") if path.stem.startswith(split))
    exact = [path for path in files if path.stem == split]
    shards = [path for path in files if _SHARD.fullmatch(path.stem[len(split) :])]
    return exact or shards or files


def read_parquet(files: Sequence[Path]) -> datasets.Dataset:
    """The rows of ``files``, one after the other.

    Small files are read into memory. Large ones go through the library, which converts them once to
    memory-mapped Arrow files in its cache (``HF_DATASETS_CACHE``).

    Raises:
        ValueError: a file is no parquet file, the files differ in their columns, or the cache cannot be
            written.
    """
    try:
        if sum(path.stat().st_size for path in files) <= IN_MEMORY_BYTES:
            tables = [datasets.Dataset(InMemoryTable(pq.read_table(path))) for path in files]
            return datasets.concatenate_datasets(tables)
        return datasets.load_dataset("parquet", data_files=[str(path) for path in files], split="train")
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{files[0]} cannot be read as a parquet file ({reason}); correct data.name"
        ) from error
