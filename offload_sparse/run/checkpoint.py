"""Checkpoints of a run: written by every rank at once, in the background, and read back on any number of
ranks.

    main thread     … step step step [state()] step step step … [release] scatter …
    second thread                     └─ plan · write ──────────────┘ · fsync · manifest · rename

The second thread talks over a gloo group of its own, so its exchanges never mix with those of the training.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.state import MethodState, Shard
from offload_sparse.run import manifest as manifests
from offload_sparse.run import rows_file as shard_file
from offload_sparse.run.checkpoint_folder import BEST, CHECKPOINT_FOLDER, CheckpointFolder
from offload_sparse.run.launch import own_group, rank_and_world_size
from offload_sparse.run.manifest import Manifest, StoredTensor
from offload_sparse.run.rows_file import FileRecord
from offload_sparse.run.shard_planner import (
    ShardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
    stored_shape,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


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


class Checkpointer:
    """Saves and loads the state of a run; every rank makes one, and all call the same methods.

    Args:
        folder: the run's folder of checkpoints.
        config: how many are kept.
        values: configuration of the run by dotted name; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, values: Mapping[str, Any]) -> None:
        self.folder = CheckpointFolder(folder)
        self._config = config
        self._values = dict(values)
        self._rank, self._world_size = rank_and_world_size()
        self._group = own_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0
        self._read = threading.Event()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
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
        shards = self._shards(state)
        manifest = Manifest(step, self._world_size, self._values, run, state.meta)
        self._thread = threading.Thread(
            target=self._write, args=(shards, manifest, best), name="checkpoint", daemon=True
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
        if not isinstance(error, CheckpointException):
            raise error
        if self._rank == 0:
            logger.warning(
                "the checkpoint of step %d was not written (%s); training goes on", self._step, _reason(error)
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
            except (ValueError, CheckpointException) as error:
                problems.append(f"{folder.name}: {_reason(error)}")
                if self._rank == 0:
                    logger.warning("checkpoint %s cannot be used: %s", folder, _reason(error))
        if problems:
            raise ValueError(
                f"no checkpoint in {source or self.folder.path} can be used ({problems[0]}); repair or "
                "remove it, or start anew with --overwrite true"
            )
        if source is not None:
            raise ValueError(f"{source} holds no checkpoint; give a run folder or one of its checkpoints")
        return None

    # --- writing ---

    def _shards(self, state: MethodState) -> dict[str, Shard]:
        """Everything that this rank writes, by the name that it has in the checkpoint."""
        shards = {f"sharded/{name}": shard for name, shard in state.sharded.items()}
        if self._rank == 0:
            shards |= {f"replicated/{name}": _whole(t) for name, t in state.replicated.items()}
        return shards | {f"local/{self._rank}/{name}": _whole(t) for name, t in state.local.items()}

    def _write(self, shards: dict[str, Shard], manifest: Manifest, best: bool) -> None:
        step = manifest.step

        def commit(files: dict[str, FileRecord], tensors: dict[str, StoredTensor]) -> None:
            fault_point("checkpoint-commit", step)
            self.folder.commit(step, manifests.dump(replace(manifest, files=files, tensors=tensors)))
            if best:
                self.folder.point(BEST, step)
            self.folder.prune(self._config.keep)

        writer = ShardWriter(
            self.folder.partial(step), step, lambda: self.folder.prepare(step), commit, self._read.set
        )
        try:
            dcp.save(
                shards,
                storage_writer=writer,
                planner=ShardSavePlanner(),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:  # handed to the thread that joins
            self._error = error
            if self._rank == 0:
                self.folder.clean()
        finally:
            self._read.set()

    # --- reading ---

    def _candidates(self, source: Path | None) -> list[Path]:
        """Where to look, in this order; rank 0 decides."""
        found: list[list[Path]] = [_checkpoints_of(source) if source else self.folder.checkpoints()]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def _load(self, folder: Path, fresh: MethodState) -> Loaded:
        manifest = self._agree(lambda: self._check(folder, fresh))
        replicated = _like(manifest, "replicated/")
        own = manifest.world_size == self._world_size
        local = _like(manifest, f"local/{self._rank}/") if own else {}
        shards = {f"sharded/{name}": shard for name, shard in fresh.sharded.items()}
        for prefix, tensors in (("replicated/", replicated), (f"local/{self._rank}/", local)):
            shards |= {prefix + name: _whole(tensor) for name, tensor in tensors.items()}
        dcp.load(
            shards,
            storage_reader=ShardReader(folder, manifest),
            planner=ShardLoadPlanner(),
            process_group=self._group,
            no_dist=self._group is None,
        )
        return Loaded(
            manifest.step,
            manifest.run,
            MethodState(dict(fresh.sharded), replicated, local, manifest.method),
            folder,
        )

    def _check(self, folder: Path, fresh: MethodState) -> Manifest:
        """Manifest and files of a checkpoint; the ranks share the work of reading the files."""
        manifest = manifests.load(folder)
        differing = differences(manifest.config, self._values)
        if differing:
            raise ValueError(f"it is of a run with {differing}")
        _check_fits(manifest, fresh)
        for name in sorted(manifest.files)[self._rank :: self._world_size]:
            problem = shard_file.check(folder / name, manifest.files[name])
            if problem:
                raise ValueError(problem)
        return manifest

    def _agree(self, function: Callable[[], _T]) -> _T:
        """The value of ``function`` on this rank.

        Raises:
            ValueError: ``function`` raised one on some rank; the same message everywhere.
        """
        value: _T | None = None
        message = ""
        try:
            value = function()
        except ValueError as error:
            message = str(error) or "ValueError"
        messages: list[str] = [message]
        if self._group is not None:
            messages = [""] * self._world_size
            dist.all_gather_object(messages, message, group=self._group)
        if any(messages):
            raise ValueError(next(filter(None, messages)))
        return value  # type: ignore[return-value]


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two configurations by dotted name differ, in words; empty if they do not."""
    keys = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    words = [f"{key} {saved.get(key)} instead of {wanted.get(key)}" for key in keys]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _checkpoints_of(path: Path) -> list[Path]:
    if (path / manifests.MANIFEST_FILE).exists():
        return [path]
    return CheckpointFolder(path / CHECKPOINT_FOLDER).checkpoints() or CheckpointFolder(path).checkpoints()


def _whole(tensor: Tensor) -> Shard:
    return Shard(tensor.detach().cpu().contiguous(), tuple(tensor.shape))


def _like(manifest: Manifest, prefix: str) -> dict[str, Tensor]:
    """Memory for every tensor whose name begins with ``prefix``."""
    return {
        name.removeprefix(prefix): torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in manifest.tensors.items()
        if name.startswith(prefix)
    }


def _check_fits(manifest: Manifest, fresh: MethodState) -> None:
    saved = {
        name.removeprefix("sharded/"): (tensor.stored_shape, tensor.dtype)
        for name, tensor in manifest.tensors.items()
        if name.startswith("sharded/")
    }
    wanted = {name: (stored_shape(shard), shard.own.dtype) for name, shard in fresh.sharded.items()}
    odd = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    odd = [name for name in odd if name in saved or 0 not in wanted[name][0]]  # empty tensors are not stored
    if odd:
        raise ValueError(f"it is of another model: {odd[0]} has another shape or type, or is not there")
    if manifest.method.get("channel_map") != fresh.meta.get("channel_map"):
        raise ValueError("it is of a model with other channels")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return str(error)
