"""The full weights, in host memory, sharded over the data-parallel ranks.

              tensor A            tensor B        tensor C
    weights   [r0 r0 r0 r1 r1 r1][r1 r1 r1 r2 r2][r2 r2 r2 r2]      one flat array per kind, rows of rank r
    only on rank r slot 1    [r0 r0 r0 r1 r1 r1][r1 r1 r1 r2 r2][r2 r2 r2 r2]      optimizer state, same rows
    as the weights buffers   [r0 r1][r1 r2]                                        BatchNorm statistics, a
    layout of their own

    gather:   own rows --index_select--> own run of the narrow buffer --broadcast of every rank's run--> whole
        narrow buffer
    scatter:  own run of the narrow buffer --index_copy_--> own rows; no network

Rank memory is (1 + slots) * bytes(full weights) / world_size. Integer buffers are not sliced; every rank
holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.store.partition import Partition
from offload_sparse.store.pinned import host_zeros
from offload_sparse.store.transfer import BlockMove, block_moves, gather, scatter
from offload_sparse.structure.channel_map import ChannelMap
from offload_sparse.structure.selection import Layout, Selection

WEIGHTS = "weights"
BUFFERS = "buffers"


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a store.

    Attributes:
        rank: this process.
        world_size: number of processes.
        host_group: process group for host tensors (gloo); None when world_size is 1 or the default group is
            gloo.
    """

    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None

    @staticmethod
    def current() -> Ranks:
        """The ranks of the default process group, or a single one when there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return Ranks()
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        assert not isinstance(group, int), "every rank is a member of the new group"
        return Ranks(dist.get_rank(), dist.get_world_size(), group)


@dataclass
class _Plan:
    """What moving one selection needs: narrow layout, own moves, and every rank's run."""

    narrow: Layout
    moves: list[BlockMove]
    segments: list[tuple[int, int]] = field(default_factory=list)


class WeightStore:
    """Full weights, optimizer slots and floating-point buffers of a network, this rank's rows of them.

    Args:
        channel_map: shapes and axes of all tensors.
        parameter_names: parameters, in buffer order.
        buffer_names: floating-point buffers, in buffer order.
        slots: names of the optimizer slots, zero at the start.
        dtype: type of weights, slots and buffers.
        ranks: the ranks that share the store.
        pin: page-lock the memory for a CUDA device.
    """

    def __init__(
        self,
        channel_map: ChannelMap,
        parameter_names: tuple[str, ...],
        buffer_names: tuple[str, ...],
        slots: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
        pin: bool = False,
    ) -> None:
        self.channel_map = channel_map
        self.ranks = ranks or Ranks()
        self.slots = slots
        self.dtype = dtype
        self._pin = pin
        shapes = channel_map.shapes
        world_size = self.ranks.world_size
        weights = Partition(Layout.of({n: tuple(shapes[n]) for n in parameter_names}), world_size)
        buffers = Partition(Layout.of({n: tuple(shapes[n]) for n in buffer_names}), world_size)
        self.partitions = {WEIGHTS: weights, BUFFERS: buffers, **dict.fromkeys(slots, weights)}
        self._shards = {kind: p.shard(self.ranks.rank) for kind, p in self.partitions.items()}
        self.arrays = {kind: host_zeros(shard.size, dtype, pin) for kind, shard in self._shards.items()}
        self.integer_buffers: dict[str, Tensor] = {}
        self._staging = torch.empty(0, dtype=dtype)
        self._plans: dict[tuple[int, str], tuple[Selection, _Plan]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def own_rows(self, name: str, kind: str | None = None) -> Tensor:
        """This rank's rows of tensor ``name`` (of the slot ``kind``), a view of the store."""
        kind = kind or (WEIGHTS if name in self.partitions[WEIGHTS].layout else BUFFERS)
        return self._shards[kind].view(self.arrays[kind], name)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take this rank's rows out of whole tensors that every rank iterates over, one at a time."""
        for name, tensor in tensors:
            if self._keep_integer(name, tensor):
                continue
            low, high = self._partition_of(name).rows(name, self.ranks.rank)
            own = self.own_rows(name)
            own.copy_(tensor[low:high] if tensor.dim() else tensor.expand(own.shape))

    def fill_from_first_rank(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Stream whole tensors that only rank 0 holds to the ranks that own their rows, shard by shard.

        Args:
            tensors: every parameter and buffer on rank 0, None elsewhere.
        """
        if self.ranks.world_size == 1:
            assert tensors is not None
            self.fill(tensors.items())
            return
        group = self.ranks.host_group
        for name in (*self.partitions[WEIGHTS].layout.shapes, *self.partitions[BUFFERS].layout.shapes):
            own = self.own_rows(name)
            if tensors is None:
                if own.numel():
                    dist.recv(own, src=0, group=group)
                continue
            own.copy_(self._rows_of(name, 0, tensors[name]))
            for rank in range(1, self.ranks.world_size):
                rows = self._rows_of(name, rank, tensors[name])
                if rows.numel():
                    dist.send(rows.contiguous(), dst=rank, group=group)
        integers = {n: t for n, t in (tensors or {}).items() if not t.is_floating_point()}
        shared = [integers]
        dist.broadcast_object_list(shared, src=0, group=group)
        self.integer_buffers = shared[0]

    def gather(self, selection: Selection, kind: str, out: Tensor) -> None:
        """Assemble the kept entries of ``kind`` on every rank.

        Args:
            selection: the kept channels.
            kind: ``WEIGHTS``, ``BUFFERS`` or a slot.
            out: flat narrow buffer in the store's dtype, on the device; every entry is written.
        """
        plan = self._plan(selection, kind)
        low, high = plan.segments[self.ranks.rank]
        if out.device.type == "cpu":
            gather(self.arrays[kind], plan.moves, out)
        else:
            staging = self._stage(high - low)
            gather(self.arrays[kind], plan.moves, staging, out_offset=low)
            out[low:high].copy_(staging)
        if self.ranks.world_size > 1:
            self._exchange(plan, out)

    def scatter(self, selection: Selection, kind: str, values: Tensor) -> None:
        """Write this rank's run of a flat narrow buffer back into its rows. Uses no network."""
        plan = self._plan(selection, kind)
        low, high = plan.segments[self.ranks.rank]
        if values.device.type == "cpu":
            scatter(self.arrays[kind], plan.moves, values)
        else:
            staging = self._stage(high - low)
            staging.copy_(values[low:high])
            scatter(self.arrays[kind], plan.moves, staging, values_offset=low)

    def forget(self, selection: Selection) -> None:
        """Drop what is remembered about moving ``selection``."""
        for key in [k for k, (known, _) in self._plans.items() if known is selection]:
            del self._plans[key]

    def _exchange(self, plan: _Plan, out: Tensor) -> None:
        pending = [
            dist.broadcast(out[low:high], src=rank, async_op=True)
            for rank, (low, high) in enumerate(plan.segments)
            if high > low
        ]
        for work in pending:
            assert work is not None
            work.wait()

    def _plan(self, selection: Selection, kind: str) -> _Plan:
        partition = self.partitions[kind]
        key = (id(selection), BUFFERS if kind == BUFFERS else WEIGHTS)
        if key not in self._plans:
            narrow = selection.layout(partition.layout.shapes)
            moves = block_moves(partition, selection, narrow, self.ranks.rank)
            segments = [partition.segment(selection, narrow, r) for r in range(self.ranks.world_size)]
            # The selection is kept beside its plan, so that its id cannot be reused while the plan is
            # remembered.
            self._plans[key] = (selection, _Plan(narrow, moves, segments))
        return self._plans[key][1]

    def _stage(self, size: int) -> Tensor:
        if self._staging.numel() < size:
            self._staging = host_zeros(size + size // 8, self.dtype, self._pin)
        return self._staging[:size]

    def _partition_of(self, name: str) -> Partition:
        return self.partitions[WEIGHTS if name in self.partitions[WEIGHTS].layout else BUFFERS]

    def _rows_of(self, name: str, rank: int, tensor: Tensor) -> Tensor:
        low, high = self._partition_of(name).rows(name, rank)
        return (tensor[low:high] if tensor.dim() else tensor.expand(high - low)).to(self.dtype)

    def _keep_integer(self, name: str, tensor: Tensor) -> bool:
        if tensor.is_floating_point():
            return False
        self.integer_buffers[name] = tensor.clone()
        return True
