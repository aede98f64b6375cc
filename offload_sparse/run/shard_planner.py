"""torch.distributed.checkpoint over rows: which rank writes what, and which saved rows a rank needs.

A store is cut by bytes and not by torch.chunk, so its rows are no DTensor; here a state dict is simply
{name: Shard}. DCP exchanges the plans, agrees on failures over all ranks and computes the overlap of saved
and wanted rows; the files are those of ``shard_file`` and ``manifest``.
"""

# Parameters have the names that DCP passes them by, used or not.
# ruff: noqa: ARG002, ARG003

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.state import Shard
from offload_sparse.run import rows_file as shard_file
from offload_sparse.run.manifest import Chunk, Manifest, StoredTensor
from offload_sparse.run.rows_file import FileRecord

Shards = Mapping[str, Shard]


def stored_shape(shard: Shard) -> tuple[int, ...]:
    """Shape of the whole tensor as it is stored; a scalar is one row."""
    return tuple(shard.global_shape) or (1,)


class ShardSavePlanner(SavePlanner):
    """Each rank writes the rows that it owns."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._shards: Shards = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, s) for name, s in self._shards.items() if s.own.numel()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        return shard_file.as_rows(self._shards[write_item.index.fqn].own.detach())


class ShardLoadPlanner(LoadPlanner):
    """Each rank reads the rows that it owns, whoever wrote them, into the memory of its shards."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._shards: Shards = state_dict
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            if shard.own.numel():
                saved = self._metadata.state_dict_metadata[name]
                assert isinstance(saved, TensorStorageMetadata)
                items += create_read_items_for_chunk_list(name, saved, [_chunk(shard)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        rows = shard_file.as_rows(self._shards[read_item.dest_index.fqn].own.detach())
        return rows.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # resolve_tensor hands out the memory itself

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_bytes(self, read_item: ReadItem) -> BytesIO:
        raise AssertionError("a checkpoint holds tensors only")


class ShardWriter(StorageWriter):
    """Writes each rank's rows into one file of ``folder``.

    Args:
        folder: where the files go.
        step: position of the checkpoint, for planned faults.
        prepare: called on rank 0 before any rank writes.
        commit: called on rank 0 with the files and tensors, once every rank has written.
        on_read: called when this rank's tensors may change again.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        prepare: Callable[[], None],
        commit: Callable[[dict[str, FileRecord], dict[str, StoredTensor]], None],
        on_read: Callable[[], None],
    ) -> None:
        self._folder, self._step = folder, step
        self._prepare, self._commit, self._on_read = prepare, commit, on_read
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = int(kwargs.get("rank") or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._prepare()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        name = shard_file.file_name(self._rank)
        results = []
        if tensors:
            fault_point("checkpoint-write", self._step)
            record = shard_file.write(self._folder / name, tensors, self._on_read)  # type: ignore[arg-type]
            results = [
                WriteResult(item.index, record.size, (name, record, item.tensor_data)) for item in plan.items
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileRecord] = {}
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            name, record, data = result.storage_data
            files[name] = record
            rows = Chunk(data.chunk.offsets[0], data.chunk.sizes[0], name)
            chunks.setdefault(result.index.fqn, []).append(rows)
        tensors = {}
        for fqn, parts in chunks.items():
            saved = metadata.state_dict_metadata[fqn]
            assert isinstance(saved, TensorStorageMetadata)
            ordered = tuple(sorted(parts, key=lambda chunk: chunk.first_row))
            tensors[fqn] = StoredTensor(saved.properties.dtype, tuple(saved.size), ordered)
        self._commit(files, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads rows out of the files that a checked manifest names."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._manifest.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of(item), []).append(item)
        for name, items in by_file.items():
            self._read_file(name, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _file_of(self, item: ReadItem) -> str:
        chunks = self._manifest.tensors[item.storage_index.fqn].chunks
        assert item.storage_index.offset is not None
        return next(c.file for c in chunks if c.first_row == item.storage_index.offset[0] and c.rows)

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        from safetensors import SafetensorError, safe_open

        path = self._folder / name
        try:
            with safe_open(path, framework="pt") as file:
                for item in items:
                    low, target = item.storage_offsets[0], planner.resolve_tensor(item)
                    rows = file.get_slice(item.storage_index.fqn)[low : low + item.lengths[0]]
                    if rows.shape != target.shape or rows.dtype != target.dtype:
                        raise ValueError(f"{path}: {item.storage_index.fqn} is not what the manifest says")
                    target.copy_(rows)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None


def _write_item(name: str, shard: Shard) -> WriteItem:
    # The size is that of the tensor, which may be a scalar; the chunk is in rows.
    properties = TensorProperties(dtype=shard.own.dtype)
    data = TensorWriteData(_chunk(shard), properties, torch.Size(shard.global_shape))
    chunk = data.chunk
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    rest = stored_shape(shard)[1:]
    rows = shard_file.as_rows(shard.own).shape[0]
    assert shard.own.numel() == rows * prod(rest)
    return ChunkStorageMetadata(torch.Size([shard.first_row, *[0] * len(rest)]), torch.Size([rows, *rest]))
