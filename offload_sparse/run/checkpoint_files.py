"""The checkpoints of a run on disk: each complete and intact, or not used.

    checkpoints/
      step_00000400/         rank_0.safetensors rank_1.safetensors … manifest.json
      step_00000450.tmp/     being written, or left by a run that died; never read
      latest, best           names: the newest complete checkpoint, the one of the best evaluation

A file says in its header which rows of which tensors it holds. Reading a checkpoint parses JSON and
safetensors and runs no code from it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_sparse.export.json_values import Count, convert, parse, read, sealed
from offload_sparse.store.files import TEMPORARY, remove, replacing, sync_folder, write_file
from offload_sparse.store.partition import row_shape
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.weight_files import read_rows, read_whole, tensors_in

CHECKPOINT_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
LATEST, BEST = "latest", "best"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"step_\d{8,}\.(tmp|old)")
_ROWS = "rows"
_BLOCK = 16 << 20  # bytes of a read
_CACHED = 128 << 20  # bytes that are written before they are waited for


@dataclass(frozen=True)
class FileRecord:
    """What a file must be when it is read again: bytes, and CRC-32 of all of them."""

    size: Count
    crc32: Count


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: how a run stood, and how each file must look. ``config`` is the configuration of the
    run by dotted name, ``run`` what the loop around the method remembers, ``method`` its
    ``MethodState.meta``; ``files`` has one for each of the ranks that wrote it."""

    step: Count
    world_size: Count
    config: dict[str, Any]
    run: dict[str, Any]
    method: dict[str, Any]
    files: dict[str, FileRecord]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"it is of format {self.format}, this version reads {FORMAT}")
        ranks = min(self.world_size, len(self.files) + 1)
        if set(self.files) != {rows_file(rank) for rank in range(ranks)}:
            raise ValueError(f"its files are not those of {self.world_size} ranks")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a checkpoint. Raises ValueError: there is none, or it is damaged, of another
        version, or points out of its folder."""
        try:
            return read(folder / MANIFEST_FILE, Manifest, sealed_by="files")
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no {MANIFEST_FILE}; it is no complete checkpoint") from None


class CheckpointFolder:
    """The folder ``checkpoints`` of a run; only rank 0 calls what changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of_step(self, step: int, ending: str = "") -> Path:
        """Where the checkpoint of ``step`` is or would be; with TEMPORARY, before it is complete."""
        return self.path / f"step_{step:08d}{ending}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        found = [path for path in self.path.glob("step_*") if re.fullmatch(_NAME, path.name)]
        folders = [path for path in found if path.is_dir() and not path.is_symlink()]
        return sorted(folders, key=step_of, reverse=True)

    def prepare(self, step: int) -> None:
        """Make an empty folder to write into."""
        remove(self.of_step(step, TEMPORARY))
        self.of_step(step, TEMPORARY).mkdir(parents=True)

    def commit(self, manifest: Manifest, best: bool, keep: int) -> None:
        """Turn what was written into a checkpoint; all but the newest ``keep`` and the best one go. Those of
        later steps, which could not be used when the run went on from an earlier one, neither count nor go.
        """
        final = self.of_step(manifest.step)
        if os.path.lexists(final):  # the same step once more, after a rollback or on other ranks
            self.discard(final)
        with replacing(final) as partial:
            write_file(partial / MANIFEST_FILE, sealed(asdict(manifest)))
        sync_folder(self.path.parent)  # where this folder may be new
        for pointer in (LATEST, BEST) if best else (LATEST,):
            write_file(self.path / pointer, final.name + "\n")
        up_to_here = [folder for folder in self.checkpoints() if step_of(folder) <= manifest.step]
        for folder in up_to_here[keep:]:
            if folder != self.pointed(BEST):
                self.discard(folder)

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that the pointer names; None where it names none."""
        try:
            text = (self.path / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.path / text if re.fullmatch(_NAME, text) else None

    def clean(self) -> None:
        """Remove what runs that died have left half-written."""
        for path in [path for path in self.path.glob("step_*") if re.fullmatch(_PARTIAL, path.name)]:
            remove(path)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps for good: the run goes on from this one."""
        for folder in self.checkpoints():
            if step_of(folder) > step:
                self.discard(folder)
                sync_folder(self.path)

    def discard(self, folder: Path) -> None:
        """Remove a checkpoint; one that is half removed does not look like a checkpoint."""
        old = folder.with_name(folder.name + ".old")
        remove(old)
        os.rename(folder, old)
        remove(old)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def rows_file(rank: int) -> str:
    return f"rank_{rank}.safetensors"


def write_rows(
    path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], on_read: Callable[[], None]
) -> FileRecord:
    """Write tensors (on the CPU, contiguous) and wait until they are on the disk. ``rows`` has, of those that
    are part of a larger tensor, (the first row, *the shape of the whole); ``on_read`` is called when
    ``tensors`` may change again, before the wait.

    What has been written leaves the page cache from time to time: the same pages serve for what follows,
    where new ones would have to be found, in competition with the training. Raises OSError: the disk is full,
    or cannot be written."""
    size, crc, waiting = 0, 0, 0
    with path.open("wb") as file:
        for block in blocks_of(tensors, {_ROWS: json.dumps(rows)}):
            crc = zlib.crc32(block, crc)
            file.write(block)
            size, waiting = size + len(block), waiting + len(block)
            if waiting >= _CACHED:
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                waiting = 0
        file.flush()
        on_read()
        os.fsync(file.fileno())
    return FileRecord(Count(size), Count(crc))


def check_file(path: Path, record: FileRecord) -> None:
    """Read a file through. Raises ValueError: it is not what ``record`` says."""
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


class RowsFile:
    """A file that is read from; ``rows`` are as they were written. Raises ValueError: it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors = tensors_in(path)
            with safe_open(path, "np") as file:
                text = (file.metadata() or {})[_ROWS]
            self.rows = convert(parse(text.encode()), dict[str, tuple[Count, ...]])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path.name} is damaged: {str(error)[:200]}") from None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor whose name begins with ``prefix``, without it."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): read_whole(self._tensors[name]) for name in names}

    def copy_rows(self, name: str, first: int, target: Tensor) -> int:
        """Fill what the file has of the rows of ``target``, which begins with row ``first``; how many."""
        if name not in self.rows or name not in self._tensors:
            return 0
        held, own = self._tensors[name], (self.rows[name] or (0,))[0]
        low, high = max(first, own), min(first + len(target), own + row_shape(held.shape)[0])
        place = target[low - first : max(low, high) - first]
        if low >= high or held.dtype != place.dtype or held.shape[1:] != place.shape[1:]:
            return 0
        read_rows(held, low - own, high - own, place)
        return high - low
