"""One rank's tensors in one file, with a record by which damage is noticed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from offload_sparse.store.tensor_file import blocks_of

_BLOCK = 16 << 20  # bytes of a read
_CACHED = 128 << 20  # bytes that are written before they are waited for


@dataclass(frozen=True)
class FileRecord:
    """What a file must be when it is read again: bytes, and CRC-32 of all of them."""

    size: int
    crc32: int


def file_name(rank: int) -> str:
    """The file of ``rank``."""
    return f"rank_{rank}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], on_read: Callable[[], None]) -> FileRecord:
    """Write ``tensors`` (on the CPU, contiguous) and wait until they are on the disk.

    Args:
        on_read: called when ``tensors`` may change again, before that wait.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    size, crc, waiting = 0, 0, 0
    with path.open("wb") as file:
        for block in blocks_of(tensors):
            crc = zlib.crc32(block, crc)
            file.write(block)
            size, waiting = size + len(block), waiting + len(block)
            if waiting >= _CACHED:
                _leave_cache(file)
                waiting = 0
        file.flush()
        on_read()
        os.fsync(file.fileno())
    return FileRecord(size, crc)


def check(path: Path, record: FileRecord) -> None:
    """Read a file through.

    Raises:
        ValueError: it is not what ``record`` says.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name} is missing")
        if path.stat().st_size != record.size:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {record.size}")
        crc = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    if crc != record.crc32:
        raise ValueError(f"{path.name} is damaged (its checksum does not fit)")


def _leave_cache(file: BinaryIO) -> None:
    """Have what was written on the disk and no longer in memory: the same pages serve for what follows, where
    new ones would have to be found, in competition with the training.
    """
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
