"""The full weights, in host memory, sharded over the data-parallel ranks.

              tensor A            tensor B        tensor C
    weights   [r0 r0 r0 r1 r1 r1][r1 r1 r1 r2 r2][r2 r2 r2 r2]   one flat array per kind; r0: on rank 0 only
    slot 1    [r0 r0 r0 r1 r1 r1][r1 r1 r1 r2 r2][r2 r2 r2 r2]   optimizer state, same rows as the weights
    buffers   [r0 r1][r1 r2]                                     BatchNorm statistics, their own layout

    fetch:     own rows --> wire buffer --sent to whom it is for, or broadcast--> every rank's narrow buffer
    put_back:  narrow buffer --> own rows; no network

Rank memory is (1 + slots) * bytes(full weights) / world_size. Every rank holds the buffers that are not
sliced: integers, and those of more bits than the weights.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.copy import copy_blocks, send_tables
from offload_sparse.store.copy.host_copy import prepare
from offload_sparse.store.copy.plans import Exchange, Narrow, TransferPlan, fetch_plan, return_plan
from offload_sparse.store.partition import Partition
from offload_sparse.store.tiers import MemoryTier

WEIGHTS = "weights"
BUFFERS = "buffers"


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a store.

    Attributes:
        host_group: their process group for host tensors (gloo); None when there is one rank or the default
            group serves.
        transfer_group: their process group for the exchange of entries, which may run beside an all-reduce
            and therefore has an order of its own.
        first: global rank of the first of them."""

    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    transfer_group: dist.ProcessGroup | None = None
    first: int = 0

    @staticmethod
    def current(per_node: bool = False) -> Ranks:
        """The ranks of the default process group, or a single one when there is none. Raises ValueError:
        ``per_node``, and the nodes do not have equally many ranks.

        Args:
            per_node: only those of this node (consecutive ranks, as ``torchrun`` numbers them, all nodes with
                as many); every node then holds all weights, and none of them crosses the network between
                nodes. Every rank of the default group must call this."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return Ranks()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        size = _ranks_per_node(world_size) if per_node else world_size
        mine = Ranks()
        for first in range(0, world_size, size):  # every rank takes part in the making of every group
            members = list(range(first, first + size))
            transfer = dist.new_group(members, timeout=default_timeout())
            host = dist.new_group(members, backend="gloo", timeout=default_timeout())
            if rank in members:
                assert not isinstance(transfer, int)
                assert not isinstance(host, int)
                mine = Ranks(rank - first, size, host, transfer, first)
                _OWN_GROUPS.update((host, transfer))
        return mine

    def abort(self) -> None:
        """Break off transfers that a lost rank keeps from ending, where nothing else would: NCCL's."""
        with suppress(ValueError):  # there is no group any more
            if self.transfer_group is not None and dist.get_backend(self.transfer_group) == "nccl":
                dist.distributed_c10d._abort_process_group(self.transfer_group)

    def close(self) -> None:
        """Free the groups; no transfer may be under way."""
        _close_groups(group for group in (self.host_group, self.transfer_group) if group is not None)

    def swap(
        self, group: dist.ProcessGroup | None, leaving: Sequence[Tensor], arriving: Sequence[Tensor]
    ) -> list[dist.Work]:
        """Begin to send a tensor to every other of these ranks, and to receive one from each, by number; what
        is empty does not travel. Returns what is to be waited for.
        """
        # Receives first: a sender of gloo waits for the word that it is expected, which would else queue
        # behind what this rank sends, and the link carry one direction after the other.
        transfers = [
            dist.P2POp(way, tensor, self.first + other, group)
            for way, tensors in ((dist.irecv, arriving), (dist.isend, leaving))
            for other, tensor in enumerate(tensors)
            if other != self.rank and tensor.numel()
        ]
        return dist.batch_isend_irecv(transfers) if transfers else []


_OWN_GROUPS: set[dist.ProcessGroup] = set()
"""Those that stores have made. One that is alive when the interpreter goes down may take the process with it:
its threads are still there, and there is nobody left to end them.
"""


def _close_groups(groups: Iterable[dist.ProcessGroup]) -> None:
    for group in tuple(groups):
        _OWN_GROUPS.discard(group)
        with suppress(ValueError):  # it has been destroyed with the default group
            dist.destroy_process_group(group)


atexit.register(_close_groups, _OWN_GROUPS)


def default_timeout() -> timedelta | None:
    """How long the default process group waits for a rank, which a new group would not know by itself."""
    for device in ("cpu", "cuda"):
        try:
            backend = dist.group.WORLD._get_backend(torch.device(device))  # type: ignore[union-attr]
        except RuntimeError:  # no backend for this device
            continue
        timeout: timedelta = backend.options._timeout
        return timeout
    return None


def _ranks_per_node(world_size: int) -> int:
    own = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    sizes = [own] * world_size
    dist.all_gather_object(sizes, own)
    if len(set(sizes)) > 1 or world_size % own:
        raise ValueError(
            f"store.shard node needs as many ranks on every node, but the nodes have "
            f"{' or '.join(map(str, sorted(set(sizes))))} of {world_size} ranks; set store.shard to world"
        )
    return own


class WeightStore:
    """Full weights, optimizer slots and floating-point buffers of a network, this rank's rows of them.

    Args:
        parameter_names: parameters, in buffer order.
        buffer_names: floating-point buffers, in buffer order.
        slots: names of the optimizer slots, zero at the start.
        tier: where the arrays are; in ordinary memory if None."""

    def __init__(
        self,
        channel_map: ChannelMap,
        parameter_names: tuple[str, ...],
        buffer_names: tuple[str, ...],
        slots: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
        tier: MemoryTier | None = None,
    ) -> None:
        self.channel_map = channel_map
        self.ranks = ranks or Ranks()
        self.slots = slots
        self.dtype = dtype
        shapes = channel_map.shapes
        world_size = self.ranks.world_size
        weights = Partition(Layout.of({n: tuple(shapes[n]) for n in parameter_names}), world_size)
        buffers = Partition(Layout.of({n: tuple(shapes[n]) for n in buffer_names}), world_size)
        self.partitions = {WEIGHTS: weights, BUFFERS: buffers, **dict.fromkeys(slots, weights)}
        self._shards = {kind: p.shard(self.ranks.rank) for kind, p in self.partitions.items()}
        self.tier = tier or MemoryTier(dtype, pin="off")
        self.arrays = {kind: self.tier.allocate(kind, shard.size) for kind, shard in self._shards.items()}
        prepare(self.arrays[WEIGHTS].numel())
        self.integer_buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(array.nbytes for array in self.arrays.values())

    def has_rows(self, name: str) -> bool:
        """Whether tensor ``name`` is divided among the ranks; others are ``integer_buffers``."""
        return name in self.partitions[WEIGHTS].layout or name in self.partitions[BUFFERS].layout

    def own_rows(self, name: str, kind: str | None = None) -> Tensor:
        """This rank's rows of tensor ``name`` (of the slot ``kind``), a view of the store."""
        kind = kind or self._kind_of(name)
        return self._shards[kind].view(self.arrays[kind], name)

    def own_range(self, name: str) -> tuple[int, int]:
        """The first row of tensor ``name`` that is this rank's, and the first behind."""
        return self.partitions[self._kind_of(name)].rows(name, self.ranks.rank)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take this rank's rows out of whole tensors that every rank iterates over, one at a time."""
        for name, tensor in tensors:
            if not self.has_rows(name):
                self.integer_buffers[name] = tensor.clone()
                continue
            own = self.own_rows(name)
            own.copy_(self._rows_of(name, self.ranks.rank, tensor).reshape(own.shape))

    def fill_from_first_rank(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Stream whole tensors (every parameter and buffer), which rank 0 of those that share the store holds
        and others give as None, to the ranks that own their rows, shard by shard."""
        if self.ranks.world_size == 1:
            assert tensors is not None
            self.fill(tensors.items())
            return
        for kind in (WEIGHTS, BUFFERS):
            for name in self.partitions[kind].layout.shapes:
                self.from_first_rank(name, kind, None if tensors is None else tensors[name])
        shared = [{n: t.clone() for n, t in (tensors or {}).items() if not self.has_rows(n)}]
        dist.broadcast_object_list(shared, src=self.ranks.first, group=self.ranks.host_group)
        self.integer_buffers = shared[0]

    def from_first_rank(self, name: str, kind: str, tensor: Tensor | None) -> None:
        """Take this rank's rows of tensor ``name`` (of the slot ``kind``), which rank 0 alone has whole."""
        own, group, first = self.own_rows(name, kind), self.ranks.host_group, self.ranks.first
        if self.ranks.rank:
            if own.numel():
                dist.recv(own, src=first, group=group)
            return
        assert tensor is not None, "the first rank has the tensors"
        own.copy_(self._rows_of(name, 0, tensor).reshape(own.shape))
        for rank in range(1, self.ranks.world_size):
            rows = self._rows_of(name, rank, tensor)
            if rows.numel():
                dist.send(rows.to(self.dtype).contiguous(), dst=first + rank, group=group)

    def to_first_rank(self, name: str, kind: str) -> Tensor | None:
        """A copy of the whole tensor ``name`` (of the slot ``kind``) on rank 0, None elsewhere."""
        own, group, first = self.own_rows(name, kind), self.ranks.host_group, self.ranks.first
        if self.ranks.rank:
            if own.numel():
                dist.send(own.contiguous(), dst=first, group=group)
            return None
        partition = self.partitions[kind]
        whole = torch.empty(partition.layout.shapes[name], dtype=self.dtype)
        rows = whole if whole.dim() else whole.view(1)
        for rank in range(self.ranks.world_size):
            low, high = partition.rows(name, rank)
            if rank == 0:
                rows[low:high].copy_(own.view(rows[low:high].shape))
            elif rows[low:high].numel():
                dist.recv(rows[low:high], src=first + rank, group=group)
        return whole

    def gather(self, kept: Selection | Narrow, kind: str, out: Tensor) -> None:
        """Assemble the kept entries (or those at their places) of ``kind`` on every rank, in ``out``: a flat
        narrow buffer in the store's dtype, on the device, of which every entry is written."""
        partition = self.partitions[kind]
        narrow = kept if isinstance(kept, Narrow) else Narrow(kept, partition.layout.shapes)
        self.fetch((fetch_plan(partition, self.ranks.rank, narrow), [(kind, out)]))

    def scatter(self, selection: Selection, kind: str, values: Tensor) -> None:
        """Write this rank's entries of a flat narrow buffer back into its rows. Uses no network."""
        partition = self.partitions[kind]
        whole = return_plan(partition, self.ranks.rank, Narrow(selection, partition.layout.shapes))
        self.put_back(whole, [(kind, values)])

    def fetch(self, *moves: tuple[TransferPlan, Sequence[tuple[str, Tensor]]]) -> int:
        """Carry out the parts of transfers that come from the store, each for some (kind, flat narrow buffer
        on the device) pairs. Returns bytes that have left this rank's rows."""
        under_way: deque[Callable[[], object]] = deque()
        for plan, arrays in moves:
            if plan.fetched is not None:
                self._copy(plan.fetched, arrays)
            for exchange, (kind, out) in product(plan.exchanges, arrays):
                under_way.append(self._begin_exchange(exchange, kind, out))
                if len(under_way) == 2:  # one is on its way while the next is packed
                    under_way.popleft()()
        for finish in under_way:
            finish()
        return sum(plan.own_entries * len(arrays) for plan, arrays in moves) * self.dtype.itemsize

    def put_back(self, plan: BlockPlan, arrays: Sequence[tuple[str, Tensor]]) -> int:
        """Write entries of narrow buffers, (kind, flat buffer on the device) pairs, into this rank's rows, by
        the moves from the rows to the buffers run backwards. Returns bytes that have come back."""
        self._copy(plan, arrays, reverse=True)
        return plan.entries * len(arrays) * self.dtype.itemsize

    def send_tables(self, plans: Iterable[BlockPlan], device: torch.device, to_host: bool = False) -> None:
        """Send to a device, in one piece, what it looks up when it copies from or to this rank's rows."""
        if self.tier.direct is None:
            send_tables(plans, device, self.arrays[WEIGHTS], to_host)

    def _copy(self, plan: BlockPlan, pairs: Sequence[tuple[str, Tensor]], reverse: bool = False) -> None:
        """Between this rank's rows and the partner of each kind."""
        if self.tier.direct is not None:
            self.tier.direct.copy(plan, pairs, reverse)
        else:
            copy_blocks(plan, [(self.arrays[kind], array) for kind, array in pairs], reverse)

    def _begin_exchange(self, exchange: Exchange, kind: str, out: Tensor) -> Callable[[], object]:
        """Send own rows to the ranks that want them, and receive from each owner its part; returns what waits
        for all of that, and moves it to its places.
        """
        wire = torch.empty(sum(exchange.received), dtype=self.dtype, device=out.device)
        parts, rank, group = wire.split(exchange.received), self.ranks.rank, self.ranks.transfer_group
        alike = len(exchange.packs) == 1  # all ranks want the same
        leaving = []
        for other, pack in enumerate(exchange.packs):
            leaving.append(parts[rank] if alike or other == rank else wire.new_empty(pack.entries))
            self._copy(pack, [(kind, leaving[-1])])
        if alike and wire.device.type == "cuda":
            pending: Sequence[dist.Work | None] = [
                dist.broadcast(part, src=self.ranks.first + owner, group=group, async_op=True)
                for owner, part in enumerate(parts)
                if part.numel()
            ]
        else:
            pending = self.ranks.swap(group, leaving * len(parts) if alike else leaving, parts)

        def finish() -> None:
            for work in pending:
                assert work is not None
                work.wait()
            copy_blocks(exchange.unpack, [(wire, out)])

        return finish

    def _kind_of(self, name: str) -> str:
        return WEIGHTS if name in self.partitions[WEIGHTS].layout else BUFFERS

    def _rows_of(self, name: str, rank: int, tensor: Tensor) -> Tensor:
        low, high = self.partitions[self._kind_of(name)].rows(name, rank)
        return tensor[low:high] if tensor.dim() else tensor.expand(high - low)
