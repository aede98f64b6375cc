"""Where the arrays of a store live: in memory, or in files that are larger than memory.

    <path>/rank0/  store.json            whose store this is; ``initialised`` once every value is on the disk
                   weights.bin           one flat array per kind, this rank's rows, mapped into memory
                   momentum_buffer.bin   …
                   integers.safetensors  buffers that are not sliced
           rank1/  …

Files are mapped shared: what is read or written passes through the system's page cache, which keeps as much
of it as there is room for and takes it back whenever memory is wanted elsewhere. None of it is the process's
own (anonymous) memory. Disk space is reserved before anything is written, so a full disk is an error at the
start and never a fault in the middle of a round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.require import Explained
from offload_sparse.store.config import Switch, TierName
from offload_sparse.store.direct_files import ALIGN, DirectFiles, Handle, open_handle
from offload_sparse.store.files import TEMPORARY, make_folder, remove, sync, write_file
from offload_sparse.store.host_memory import host_zeros
from offload_sparse.store.lock import lock_folder
from offload_sparse.store.tensor_file import blocks_of

logger = logging.getLogger(__name__)

FORMAT = 1
_MOST_BYTES = 1 << 20  # of a store.json
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Claims no memory for a private mapping, which may be longer than there is; Python names it from 3.13 on."""

Mode = Literal["new", "resume", "replace", "look"]
"""``new`` makes a store where there is none, ``resume`` opens one that is complete, ``replace`` makes one
whatever there is of the same run; ``look`` opens a complete one of any run, and what is written to its arrays
stays in this process."""


@dataclass(frozen=True)
class Identity:
    """What a store must agree with before a run may touch it: a name that no other run has, the digest of the
    network's shapes and channels, the type of the arrays, and the place among the ranks that share it."""

    run: str
    channel_map: str
    dtype: str
    world_size: int
    rank: int

    @staticmethod
    def of(run: str, channel_map: ChannelMap, dtype: torch.dtype, world_size: int, rank: int) -> Identity:
        return Identity(run, digest(channel_map), str(dtype).removeprefix("torch."), world_size, rank)


class MemoryTier:
    """Gives a store its arrays, in this process's memory.

    Attributes:
        filled: the arrays hold values already, and must not be initialised.
        direct: moves blocks of the arrays, where they must not be touched as memory for that; else None."""

    filled = False
    direct: DirectFiles | None = None

    def __init__(self, dtype: torch.dtype, pin: Switch) -> None:
        self._dtype, self._pin = dtype, pin

    def allocate(self, kind: str, size: int) -> Tensor:
        """The flat array [size] of ``kind``; zeros unless ``filled``."""
        del kind
        return host_zeros(size, self._dtype, self._pin)

    def complete(self, integers: dict[str, Tensor]) -> None:
        """Every array has its first values: make them last, with the buffers that are not sliced."""

    def integers(self) -> dict[str, Tensor]:
        """The buffers that ``complete`` was given, of a tier that is ``filled``."""
        raise AssertionError("memory is never filled")

    def sync(self) -> None:
        """Wait until everything that was written would survive a loss of power."""


class FileTier(MemoryTier):
    """Arrays in memory-mapped files. Raises ValueError: the folder holds another store, or none that ``mode``
    can use; nothing was written.

    Args:
        folder: folder of the store; this rank's files are in ``rank<n>`` below it.
        open_direct: folder -> what reads and writes files past the page cache, or None; the arrays are then
            mapped all the same, for whoever reads or writes whole tensors.

    Attributes:
        looks: what is written to the arrays stays in this process."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        dtype: torch.dtype = torch.float32,
        mode: Mode = "new",
        open_direct: Callable[[Path], Handle | None] | None = None,
    ) -> None:
        self.folder = folder / f"rank{identity.rank}"
        unlock = weakref.finalize(self, lock_folder(folder, name=f"rank{identity.rank}.lock").release)
        super().__init__(dtype, pin="off")
        self._identity = identity
        try:
            found = self._read()
            self._refuse(found, mode)
        except ValueError:
            unlock()
            raise
        self.filled = mode in ("resume", "look")
        self.looks = mode == "look"
        self._sizes: dict[str, int] = dict(found["sizes"]) if self.filled and found else {}
        self._paths: dict[str, Path] = {}
        if not self.filled:
            self._begin(mode)
        handle = open_direct(self.folder) if open_direct else None
        self.direct = DirectFiles(handle, self._paths, dtype) if handle else None

    def allocate(self, kind: str, size: int) -> Tensor:
        path = self._paths[kind] = self.folder / f"{kind}.bin"
        if self.filled:
            self._check_file(path, kind, size)
        self._sizes[kind] = size
        if not size:
            return torch.empty(0, dtype=self._dtype)
        if not self.filled:
            _reserve(path, self._file_bytes(size))
        flags = mmap.MAP_PRIVATE | _NO_RESERVE if self.looks else mmap.MAP_SHARED
        with path.open("rb" if self.looks else "r+b") as file:
            mapped = mmap.mmap(file.fileno(), size * self._dtype.itemsize, flags)
        return torch.frombuffer(mapped, dtype=self._dtype)

    def complete(self, integers: dict[str, Tensor]) -> None:
        write_file(self.folder / "integers.safetensors", blocks_of(integers))
        self.sync()
        self._write(initialised=True)

    def integers(self) -> dict[str, Tensor]:
        path = self.folder / "integers.safetensors"
        with Explained(f"{path} is missing or damaged (", "); give store.path another folder"):
            return load_file(path)

    def sync(self) -> None:
        for path in self._paths.values():
            if path.exists():  # of no entries there is no file
                sync(path)  # with what was written through the mapping

    # --- store.json ---

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "store.json"
        if not path.exists():
            if self.folder.exists() and any(e.suffix != TEMPORARY for e in self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} holds files but no store.json; give store.path another folder"
                )
            return None
        found = _described(path)
        types = {"format": int, "initialised": bool, "sizes": dict}
        types |= {name: type(value) for name, value in asdict(self._identity).items()}
        if any(type(found.get(name)) is not kind for name, kind in types.items()):
            raise ValueError(f"{path} does not describe a store; give store.path another folder")
        return found

    def _refuse(self, found: dict[str, Any] | None, mode: Mode) -> None:
        if found is None:
            if mode in ("resume", "look"):
                raise ValueError(f"there is no store in {self.folder}; start the run anew, or set store.path")
            return
        expected = {"format": FORMAT, **asdict(self._identity)}
        if mode == "look":
            del expected["run"]
        elif mode == "replace":
            expected = {"run": self._identity.run}
        for key, value in expected.items():
            if found[key] != value:
                advice = "give store.path another folder"
                if key == "world_size" and mode == "resume":
                    advice = "start as many ranks, or give store.path another folder"
                elif key == "world_size" and mode == "look":
                    advice = "finish the run, which leaves its network in its own folder"
                raise ValueError(
                    f"the store in {self.folder} has {key.replace('_', ' ')} {repr(found[key])[:100]}, "
                    f"this run {value!r}; {advice}"
                )
        if mode == "new" and found["initialised"]:
            raise ValueError(
                f"{self.folder} holds the weights of this run; resume it, delete the folder, "
                "or set store.path"
            )
        if mode in ("resume", "look") and not found["initialised"]:
            raise ValueError(f"the store in {self.folder} was never filled; start the run anew")

    def _begin(self, mode: Mode) -> None:
        """Say whose the folder is, then empty it of an earlier start's files: a kill in between leaves a
        store that was never filled."""
        try:
            make_folder(self.folder)
            self._write(initialised=False)
            for left in self.folder.iterdir():
                if left.name != "store.json":
                    remove(left)
            if mode == "replace" and self._identity.rank == 0:
                self._remove_later_ranks()
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written ({error.strerror}); set store.path") from error

    def _remove_later_ranks(self) -> None:
        """Those of an earlier start of the run, on more ranks; what says whose they are goes last."""
        for path in self.folder.parent.glob("rank*/store.json"):
            found, own = _described(path), self._identity
            rank, folder = found.get("rank"), path.parent
            later = type(rank) is int and rank >= own.world_size and folder.name == f"rank{rank}"
            if later and found.get("run") == own.run:
                for left in sorted(folder.iterdir(), key=path.__eq__):
                    remove(left)
                folder.rmdir()

    def _write(self, initialised: bool) -> None:
        values = {"format": FORMAT, **asdict(self._identity), "sizes": self._sizes}
        text = json.dumps(values | {"initialised": initialised}, indent=2)
        write_file(self.folder / "store.json", text)

    def _file_bytes(self, size: int) -> int:
        """Bytes of the file of ``size`` entries, which direct reads and writes may take whole."""
        return -(-size * self._dtype.itemsize // ALIGN) * ALIGN

    def _check_file(self, path: Path, kind: str, size: int) -> None:
        there = path.stat().st_size if path.exists() else 0
        if self._sizes.get(kind) != size or there != self._file_bytes(size):
            raise ValueError(
                f"{path} does not hold {size} values of {self._dtype}: it belongs to another run; "
                "set store.path"
            )


def never_filled(folder: Path, rank: int) -> bool:
    """Whether a rank has begun its part of the store in ``folder`` and not given it all its first values, so
    that nothing is lost with the store; of which run is another question."""
    path = folder / f"rank{rank}" / "store.json"
    return path.exists() and not _described(path).get("initialised")


def _described(path: Path) -> dict[str, Any]:
    """What a ``store.json`` says; nothing where it is not what a store writes."""
    try:
        if path.is_file() and path.stat().st_size < _MOST_BYTES:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        logger.debug("%s cannot be read", path)
    return {}


def open_tier(
    tier: TierName,
    folder: Path,
    identity: Identity,
    dtype: torch.dtype,
    pin: Switch,
    mode: Mode = "new",
) -> MemoryTier:
    """The tier that a configuration names.

    ``nvme`` is ``file`` with rounds that go past the page cache, through DeepSpeed's DeepNVMe; where that
    cannot be had it equals ``file``, with one warning. Either opens what the other has written. Raises
    ValueError: the folder holds another store, or none that ``mode`` can use."""
    if tier == "ram":
        if mode == "resume":
            raise ValueError("a store in memory does not outlive its run; set store.tier file")
        return MemoryTier(dtype, pin)
    direct = open_handle if tier == "nvme" and mode != "look" else None
    return FileTier(folder, identity, dtype, mode, direct)


def digest(channel_map: ChannelMap) -> str:
    """Hexadecimal digest of everything that decides what a row of a store is."""
    found = hashlib.blake2b(digest_size=16)
    found.update(repr([(g.name, g.start, g.size) for g in channel_map.groups]).encode())
    found.update(channel_map.unions.numpy().tobytes())
    for name, shape in channel_map.shapes.items():
        found.update(repr((name, tuple(shape))).encode())
        for axis in channel_map.axes[name]:
            found.update(b"-" if axis is None else axis.numpy().tobytes())
    return found.hexdigest()


def _reserve(path: Path, total: int) -> None:
    """A file of ``total`` zero bytes whose blocks are taken from the disk now."""
    free = shutil.disk_usage(path.parent).free
    message = (
        f"{path} needs {total / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free; "
        "free space or set store.path"
    )
    if total > free:
        raise ValueError(message)
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            raise ValueError(f"{message} ({error.strerror})") from error
