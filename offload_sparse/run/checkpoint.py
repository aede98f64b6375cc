"""Checkpoints of a run: one file of rows per rank and a manifest, read back on any number of ranks.

    checkpoints/
      step_00000400/         rank_0.safetensors … manifest.json
      step_00000450.tmp/     being written, or left by a run that died; never read
      latest                 name of the newest complete checkpoint
      best                   name of the one with the best validation accuracy

    main thread     … step step step [state()] step step step … [release] scatter …
    second thread                     └─ own rows ──────────────────┘ · fsync · manifest · rename

The second thread talks over a gloo group of its own, so its exchanges never mix with those of the training.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.state import MethodState
from offload_sparse.run import manifest as manifests
from offload_sparse.run import rows_file
from offload_sparse.run.launch import own_group, rank_and_world_size
from offload_sparse.run.manifest import Chunk, Manifest, StoredTensor
from offload_sparse.store.files import remove, replacing, sync_folder, write_file

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoints"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"step_\d{8,}\.(tmp|old)")

_T = TypeVar("_T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; raised alike on every rank."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read.

    Attributes:
        step: optimizer steps that it has behind it.
        run: what the loop had remembered.
        state: for ``Method.restore``.
        folder: where it was.
    """

    step: int
    run: dict[str, Any]
    state: MethodState
    folder: Path


class CheckpointFolder:
    """The folder ``checkpoints`` of a run; only rank 0 calls what changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of_step(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is or would be."""
        return self.path / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is written before it is complete."""
        return self.path / f"step_{step:08d}.tmp"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        try:
            names = [entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [(int(match[1]), name) for name in names if (match := re.fullmatch(_NAME, name))]
        return [self.path / name for _, name in sorted(found, reverse=True)]

    def prepare(self, step: int) -> None:
        """Make an empty folder to write into."""
        remove(self.partial(step))
        self.partial(step).mkdir(parents=True)

    def commit(self, step: int, manifest: str) -> None:
        """Turn what was written for ``step`` into a checkpoint."""
        if os.path.lexists(self.of_step(step)):  # the same step once more, after a rollback or on other ranks
            self.discard(self.of_step(step))
        with replacing(self.of_step(step)) as partial:
            write_file(partial / manifests.MANIFEST_FILE, manifest)
        sync_folder(self.path.parent)  # where this one may be new
        self.point(LATEST, step)

    def point(self, name: str, step: int) -> None:
        """Let the pointer ``name`` name the checkpoint of ``step``."""
        write_file(self.path / name, self.of_step(step).name + "\n")

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that the pointer names; None where it names none."""
        try:
            text = (self.path / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.path / text if re.fullmatch(_NAME, text) else None

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints and the best one."""
        for folder in self.checkpoints()[keep:]:
            if folder != self.pointed(BEST):
                self.discard(folder)

    def clean(self) -> None:
        """Remove what runs that died have left half-written."""
        if self.path.is_dir():
            for entry in list(self.path.iterdir()):
                if re.fullmatch(_PARTIAL, entry.name) and entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)

    def discard(self, folder: Path) -> None:
        """Remove a checkpoint; one that is half removed does not look like a checkpoint."""
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)


class Checkpointer:
    """Saves and loads the state of a run; every rank makes one, and all call the same methods.

    Args:
        folder: the run's folder of checkpoints.
        config: how many are kept.
        values: configuration of the run by dotted name; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, values: Mapping[str, Any]) -> None:
        self.folder = CheckpointFolder(folder)
        self._config, self._values = config, dict(values)
        self._rank, self._world_size = rank_and_world_size()
        self._group = own_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0
        self._read = threading.Event()
        if self._rank == 0:
            self.folder.clean()

    def save(
        self, step: int, state: MethodState, run: dict[str, Any], *, best: bool = False, wait: bool = True
    ) -> None:
        """Write a checkpoint, in the background unless ``wait``.

        ``state.sharded`` must stay as it is until ``release`` returns. A checkpoint that cannot be written is
        a warning: the run goes on, and the older checkpoints stay.

        Args:
            step: optimizer steps done; equal on every rank, as are ``run`` and ``best``.
            state: of the method.
            run: JSON values that the loop remembers.
            best: whether it is the best so far, to be kept.
            wait: return when it is written.
        """
        self.join()
        self._step = step
        self._read.clear()
        manifest = Manifest(step, self._world_size, self._values, run, state.meta, {}, {})
        self._thread = threading.Thread(
            target=self._save, args=(state, manifest, best), name="checkpoint", daemon=True
        )
        self._thread.start()
        if wait:
            self.join()

    def release(self) -> None:
        """Wait until what is being saved may change again; the disk may still be at work."""
        if self._thread is not None:
            self._read.wait()
            if not self._thread.is_alive():
                self.join()

    def join(self) -> bool:
        """Wait for the checkpoint that is being written; False if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return True
        if not isinstance(error, CheckpointError):
            raise error
        if self._rank == 0:
            logger.warning(
                "the checkpoint of step %d was not written (%s); training goes on", self._step, error
            )
        return False

    def load(self, fresh: MethodState, source: Path | None = None) -> Loaded | None:
        """Read the newest checkpoint that is intact.

        Args:
            fresh: state of the method as it is now; its ``sharded`` tensors are read into.
            source: a checkpoint, or the folder of a run, to read instead of this run's own.

        Returns:
            the checkpoint, or None when there is none at all.

        Raises:
            ValueError: there are checkpoints, but none can be used (on every rank).
        """
        problems = []
        for folder in self._candidates(source):
            try:
                return self._load(folder, fresh)
            except CheckpointError as error:
                problems.append(f"{folder.name}: {error}")
                if self._rank == 0:
                    logger.warning("checkpoint %s cannot be used: %s", folder, error)
        if problems:
            raise ValueError(
                f"no checkpoint in {source or self.folder.path} can be used ({problems[0]}); repair or "
                "remove it, or start anew with --overwrite true"
            )
        if source is not None:
            raise ValueError(f"{source} holds no checkpoint; give a run folder or one of its checkpoints")
        return None

    # --- writing, on the second thread ---

    def _save(self, state: MethodState, manifest: Manifest, best: bool) -> None:
        try:
            self._write(state, manifest, best)
        except BaseException as error:  # handed to the thread that joins
            self._error = error
            if self._rank == 0:
                self.folder.clean()
        finally:
            self._read.set()

    def _write(self, state: MethodState, manifest: Manifest, best: bool) -> None:
        step, first = manifest.step, self._rank == 0
        self._agree(lambda: self.folder.prepare(step) if first else None)
        tensors = {f"sharded/{name}": as_rows(s.own) for name, s in state.sharded.items() if s.own.numel()}
        if first:
            tensors |= {f"replicated/{name}": _whole(t) for name, t in state.replicated.items()}
        tensors |= {f"local/{name}": _whole(t) for name, t in state.local.items()}

        def write() -> rows_file.FileRecord:
            fault_point("checkpoint-write", step)
            path = self.folder.partial(step) / rows_file.file_name(self._rank)
            return rows_file.write(path, tensors, self._read.set)

        own = {name: (s.first_row, len(as_rows(s.own))) for name, s in state.sharded.items() if s.own.numel()}
        of_ranks = self._all((self._agree(write), own))
        files = [rows_file.file_name(rank) for rank in range(self._world_size)]
        manifest.files.update((file, record) for file, (record, _) in zip(files, of_ranks, strict=True))
        for name, shard in state.sharded.items():
            held = [Chunk(*rows[name], files[i]) for i, (_, rows) in enumerate(of_ranks) if name in rows]
            chunks = tuple(sorted(held, key=lambda chunk: chunk.first_row))
            manifest.tensors[name] = StoredTensor(str(shard.own.dtype), tuple(shard.global_shape), chunks)
        self._agree(lambda: self._commit(manifest, best) if first else None)

    def _commit(self, manifest: Manifest, best: bool) -> None:
        fault_point("checkpoint-commit", manifest.step)
        self.folder.commit(manifest.step, manifests.dump(manifest))
        if best:
            self.folder.point(BEST, manifest.step)
        self.folder.prune(self._config.keep)

    # --- reading ---

    def _candidates(self, source: Path | None) -> list[Path]:
        """Where to look, in this order; rank 0 decides."""
        found = _checkpoints_of(source) if source else self.folder.checkpoints()
        return self._all(found)[0]

    def _load(self, folder: Path, fresh: MethodState) -> Loaded:
        manifest = self._agree(lambda: self._check(folder, fresh))
        replicated, local = self._agree(lambda: self._read_tensors(folder, manifest, fresh))
        state = MethodState(dict(fresh.sharded), replicated, local, manifest.method)
        return Loaded(manifest.step, manifest.run, state, folder)

    def _check(self, folder: Path, fresh: MethodState) -> Manifest:
        """Manifest and files of a checkpoint; the ranks share the work of reading the files."""
        manifest = manifests.load(folder)
        differing = differences(manifest.config, self._values)
        if differing:
            raise ValueError(f"it is of a run with {differing}")
        _check_fits(manifest, fresh)
        for name in sorted(manifest.files)[self._rank :: self._world_size]:
            rows_file.check(folder / name, manifest.files[name])
        return manifest

    def _read_tensors(
        self, folder: Path, manifest: Manifest, fresh: MethodState
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This rank's rows into the memory of ``fresh``; the replicated and the local tensors."""
        opened = {name: _Opened(folder / name) for name in manifest.files}
        for name, shard in fresh.sharded.items():
            own = as_rows(shard.own)
            for chunk in manifest.tensors[name].chunks if own.numel() else ():
                low = max(shard.first_row, chunk.first_row)
                high = min(shard.first_row + len(own), chunk.first_row + chunk.rows)
                if low < high:
                    target = own[low - shard.first_row : high - shard.first_row]
                    opened[chunk.file].rows(f"sharded/{name}", low - chunk.first_row, target)
        same_ranks = manifest.world_size == self._world_size
        local = opened[rows_file.file_name(self._rank)].tensors("local/") if same_ranks else {}
        return opened[rows_file.file_name(0)].tensors("replicated/"), local

    # --- all ranks ---

    def _agree(self, function: Callable[[], _T]) -> _T:
        """The value of ``function`` on this rank.

        Raises:
            CheckpointError: ``function`` raised OSError or ValueError on some rank; alike everywhere.
        """
        value, message = None, ""
        try:
            value = function()
        except ValueError as error:
            message = str(error) or "ValueError"
        except OSError as error:
            message = f"rank {self._rank}: {error}"
        found = next(filter(None, self._all(message)), "")
        if found:
            raise CheckpointError(found)
        return value  # type: ignore[return-value]

    def _all(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order."""
        values: list[Any] = [value] * self._world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values


class _Opened:
    """A file of rows that is read from.

    Raises:
        ValueError: it is not what its checkpoint says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor whose name begins with ``prefix``, without it."""
        names = [name for name in self._names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file.get_tensor(name) for name in names}

    def rows(self, name: str, first: int, target: Tensor) -> None:
        """Fill ``target`` with the rows from ``first`` on."""
        try:
            rows = self._file.get_slice(name)[first : first + len(target)]
        except SafetensorError as error:
            raise ValueError(f"{self._path} cannot be read: {error}") from None
        if rows.shape != target.shape or rows.dtype != target.dtype:
            raise ValueError(f"{self._path}: {name} is not what the manifest says")
        target.copy_(rows)


def as_rows(tensor: Tensor) -> Tensor:
    """``tensor`` with a first dimension: a scalar becomes [1]."""
    return tensor.detach() if tensor.dim() else tensor.detach().view(1)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two configurations by dotted name differ, in words; empty if they do not."""
    keys = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    words = [f"{key} {saved.get(key)} instead of {wanted.get(key)}" for key in keys]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _checkpoints_of(path: Path) -> list[Path]:
    if (path / manifests.MANIFEST_FILE).exists():
        return [path]
    return CheckpointFolder(path / CHECKPOINT_FOLDER).checkpoints() or CheckpointFolder(path).checkpoints()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _check_fits(manifest: Manifest, fresh: MethodState) -> None:
    saved = {name: (tensor.shape, tensor.dtype) for name, tensor in manifest.tensors.items()}
    wanted = {name: (tuple(s.global_shape), str(s.own.dtype)) for name, s in fresh.sharded.items()}
    odd = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if odd:
        raise ValueError(f"it is of another model: {odd[0]} has another shape or type, or is not there")
    if manifest.method.get("channel_map") != fresh.meta.get("channel_map"):
        raise ValueError("it is of a model with other channels")
