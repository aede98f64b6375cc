"""Checkpoints of a run: written by every rank at once, in the background, and read back on any number of
ranks.

    main thread     … step step step [state()] step step step … [release] scatter …
    second thread                     └─ own rows ──────────────────┘ · fsync · manifest · rename

The second thread talks over a gloo group of its own, so its exchanges never mix with those of the training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.distributed import agreed, attempt, everyones, rank_and_world_size
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.state import MethodState
from offload_sparse.export.json_values import Count, digest
from offload_sparse.run import checkpoint_files
from offload_sparse.run.checkpoint_files import CheckpointFolder, FileRecord, Manifest, RowsFile, rows_file
from offload_sparse.run.launch import own_group
from offload_sparse.run.resume import PLACES, differences
from offload_sparse.store.files import TEMPORARY

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; raised alike on every rank."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read: what it says of the run, and the state for ``Method.restore``."""

    manifest: Manifest
    state: MethodState
    folder: Path


class Checkpointer:
    """Saves and loads the state of a run; every rank makes one, and all call the same methods. ``values`` is
    the configuration by dotted name; a checkpoint of another one is refused."""

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

    def save(self, step: int, state: MethodState, run: dict[str, Any], best: bool = False) -> None:
        """Write a checkpoint in the background, and keep it if it is the ``best`` so far.

        ``state.sharded`` must stay as it is until ``release`` returns; ``step``, ``run`` (what the loop
        remembers, in JSON values) and ``best`` are equal on every rank. A checkpoint that cannot be written
        is a warning: the run goes on, and the older checkpoints stay."""
        self.join()
        self._step = step
        self._read.clear()
        arguments = (step, state, run, best)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

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
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        if error is not None and self._rank == 0:
            logger.warning(
                "the checkpoint of step %d was not written (%s); training goes on", self._step, error
            )
        return error is None

    def load(self, fresh: MethodState, source: Path | None = None) -> Loaded | None:
        """Read the newest checkpoint that is intact into the ``sharded`` tensors of ``fresh``, of this run or
        of ``source`` (a checkpoint, or the folder of a run); None when there is none at all. Raises
        ValueError: there are checkpoints, but none can be used (on every rank)."""
        self.join()
        problems: list[tuple[Path, str]] = []
        own = _checkpoints_of(source) if source else self.folder.checkpoints()
        for folder in everyones(own, self._world_size, self._group)[0]:
            try:
                manifest = self._agree(lambda f=folder: self._check(f, fresh))  # type: ignore[misc]
                state = self._agree(lambda f=folder, m=manifest: self._read_state(f, m, fresh))  # type: ignore[misc]
                self._tell_unusable(problems)
                return Loaded(manifest, state, folder)
            except CheckpointError as error:
                problems.append((folder, str(error)))
        if problems:
            newest, problem = problems.pop(0)
            self._tell_unusable(problems)
            other = "it is of" in problem
            advice = "give the settings that it was made with" if other else "repair or remove it"
            instead = "leave out resume" if source else "start anew with --overwrite true"
            raise ValueError(
                f"no checkpoint in {source or self.folder.path} can be used ({newest.name}: {problem}); "
                f"{advice}, or {instead}"
            )
        if source is not None:
            raise ValueError(f"{source} holds no checkpoint; give a run folder or one of its checkpoints")
        return None

    def _tell_unusable(self, problems: Sequence[tuple[Path, str]]) -> None:
        for folder, problem in problems if self._rank == 0 else ():
            logger.warning("checkpoint %s cannot be used: %s", folder, problem)

    # --- writing, on the second thread ---

    def _save(self, step: int, state: MethodState, run: dict[str, Any], best: bool) -> None:
        try:
            manifest = self._write(step, state, run)
            fault_point("checkpoint-commit", step)
            self._on_first(lambda: self.folder.commit(manifest, best, self._config.keep))
        except BaseException as error:  # handed to the thread that joins
            self._error = error
            if self._rank == 0:
                self.folder.clean()
        finally:
            self._read.set()

    def _write(self, step: int, state: MethodState, run: dict[str, Any]) -> Manifest:
        """Every rank writes its rows; the manifest of all of them."""
        self._on_first(lambda: self.folder.prepare(step))
        sharded = {f"sharded/{name}": shard for name, shard in state.sharded.items() if shard.own.numel()}
        tensors = {name: torch.atleast_1d(shard.own.detach()) for name, shard in sharded.items()}
        small = {f"replicated/{n}": t for n, t in state.replicated.items() if self._rank == 0}
        small |= {f"local/{n}": t for n, t in state.local.items()}
        tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in small.items()}
        rows = {name: (shard.first_row, *shard.global_shape) for name, shard in sharded.items()}

        def write() -> FileRecord:
            fault_point("checkpoint-write", step)
            path = self.folder.of_step(step, TEMPORARY) / rows_file(self._rank)
            return checkpoint_files.write_rows(path, tensors, rows, self._read.set)

        written = everyones(self._agree(write), self._world_size, self._group)
        files = {rows_file(rank): record for rank, record in enumerate(written)}
        return Manifest(Count(step), Count(self._world_size), self._values, run, state.meta, files)

    # --- reading ---

    def _check(self, folder: Path, fresh: MethodState) -> Manifest:
        """Manifest and files of a checkpoint; the ranks share the work of reading the files."""
        manifest = Manifest.read(folder)
        knows_images = bool(manifest.run.get("images"))  # of earlier versions, only the places are known
        differing = differences(manifest.config, self._values, PLACES if knows_images else ())
        if differing:
            raise ValueError(f"it is of a run with {differing}")
        channels = manifest.method.get("channel_map")
        if isinstance(channels, dict):  # of earlier versions: the map itself
            channels = digest(channels)
        if channels != fresh.meta.get("channel_map"):
            raise ValueError("it is of a model with other channels")
        for name in sorted(manifest.files)[self._rank :: self._world_size]:
            checkpoint_files.check_file(folder / name, manifest.files[name])
        return manifest

    def _read_state(self, folder: Path, manifest: Manifest, fresh: MethodState) -> MethodState:
        """The state of a checked checkpoint; this rank's rows go into the memory of ``fresh``."""
        files = [RowsFile(folder / rows_file(rank)) for rank in range(manifest.world_size)]
        shapes = {name: tuple(rows[1:]) for file in files for name, rows in file.rows.items()}
        for name, shard in fresh.sharded.items():
            own, key = torch.atleast_1d(shard.own.detach()), f"sharded/{name}"
            filled = sum(file.copy_rows(key, shard.first_row, own) for file in files)
            same = shapes.pop(key, tuple(shard.global_shape)) == tuple(shard.global_shape)
            if not same or (own.numel() and filled != len(own)):
                raise ValueError(f"it is of another model: {name} has another shape or type, or is not there")
        if shapes:
            raise ValueError(f"it is of another model, with {next(iter(shapes))}")
        local = files[self._rank].tensors("local/") if len(files) == self._world_size else {}
        return MethodState(dict(fresh.sharded), files[0].tensors("replicated/"), local, manifest.method)

    # --- all ranks ---

    def _on_first(self, function: Callable[[], None]) -> None:
        """``function`` on rank 0; what it raises, every rank does."""
        self._agree(function if self._rank == 0 else lambda: None)

    def _agree(self, function: Callable[[], _T]) -> _T:
        """The value of ``function`` on this rank. Raises CheckpointError: ``function`` raised OSError or
        ValueError on some rank; alike everywhere."""
        try:
            return agreed(attempt(function), self._group)
        except (ValueError, OSError, SafetensorError) as error:
            raise CheckpointError(str(error) or type(error).__name__) from None


def _checkpoints_of(path: Path) -> list[Path]:
    if (path / checkpoint_files.MANIFEST_FILE).exists():
        return [path]
    own = CheckpointFolder(path / checkpoint_files.CHECKPOINT_FOLDER).checkpoints()
    return own or CheckpointFolder(path).checkpoints()
