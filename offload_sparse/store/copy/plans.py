"""How one subnet follows another: what stays on the device, what comes from the store, what goes back.

    subnets of the last round   a ───┐ carried: device to device
                                b ───┤
    subnet of the next round         └─▶ target ◀── fetched: from the rows of every rank
    subnets of the last round   a, b ─▶ returned: entries that no subnet of the next round trains ─▶ own rows

Over several ranks entries pass through a wire buffer, owners one after the other: every rank packs its own
rows for whoever wants them, and unpacks what all owners have sent. Where all ranks want the same, tensors go
in batches, which bounds the wire buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.store.copy.blocks import COUNTED, WIDTH, BlockPlan, Numbers, batches
from offload_sparse.store.copy.regions import Pieces, Regions, places_of
from offload_sparse.store.partition import Partition

WIRE = 1 << 24
"""Entries per wire buffer, unless a single tensor needs more."""


@dataclass
class Exchange:
    """Entries on the way from the ranks that own them.

    Attributes:
        packs: own rows to the wire: one plan for all ranks, or one per rank, each for a subnet of its own.
        unpack: what this rank receives, owners one after the other, to its narrow buffer.
        received: entries that it receives from each owner.
    """

    packs: list[BlockPlan]
    unpack: BlockPlan
    received: list[int]


@dataclass
class TransferPlan:
    """How the entries of one subnet come about, for arrays of one layout.

    Attributes:
        carried: per holder that has any, from its narrow buffer to the target's.
        fetched: own rows to the narrow buffer; a single rank needs nothing else.
        exchanges: the same over several ranks.
        late: what the store only has once the round before has been put back.
    """

    carried: dict[int, BlockPlan]
    fetched: BlockPlan | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    late: TransferPlan | None = None

    @property
    def own_entries(self) -> int:
        """Entries that leave this rank's rows."""
        packs = [pack for exchange in self.exchanges for pack in exchange.packs]
        return sum(plan.entries for plan in (*packs, self.fetched) if plan is not None)


_Columns = tuple[Numbers, Numbers, Numbers | int, Numbers | int]
"""Where an array has pieces: the columns of ``Grid``."""


class Narrow:
    """A selection together with the layout of some of its tensors in one flat buffer.

    Args:
        selection: what is kept.
        names: the tensors, in buffer order.
        step: each begins at a multiple of so many entries.
    """

    def __init__(self, selection: Selection, names: Iterable[str], step: int = 1) -> None:
        self.selection, self.step = selection, step
        self.names = tuple(names)
        self.layout: Layout = selection.layout(self.names, step)
        places = places_of(selection)
        self.full = places.geometry.tensors(self.names)
        self._starts = self.layout.starts
        self._row_lengths = places.counts[self.full.units] * self.full.unit

    def among(self, regions: Regions, holder: int | None) -> _Stretch:
        """The buffer, as ``regions`` have it: as the target (None), or as this holder."""
        return _Stretch(self._starts, self._row_lengths, regions.stretch(holder), self.layout.size)


@dataclass
class _Stretch:
    """A narrow buffer, and where the numbers of its rows and units are."""

    starts: Numbers
    row_lengths: Numbers
    stretch: int
    size: int

    def columns(self, pieces: Pieces) -> _Columns:
        rows, units = pieces.rows + self.stretch, pieces.units + self.stretch
        return self.starts[pieces.tensors], self.row_lengths[pieces.tensors], rows, units


class _Shard:
    """The rows of the store that a rank owns."""

    def __init__(self, partition: Partition, rank: int, target: Narrow) -> None:
        self._row_lengths = target.full.row_length
        self.size = partition.shard(rank).size
        starts, rows = partition.places(target.names, rank)
        self._starts = starts - rows[:, 0] * self._row_lengths
        self._rows = rows if partition.world_size > 1 else None

    def own(self, pieces: Pieces, indices: Numbers) -> Pieces:
        """What the rank owns of ``pieces``."""
        if self._rows is None:
            return pieces
        low, high = self._rows[pieces.tensors].T
        first, last = indices[pieces.rows], indices[pieces.rows + pieces.n_rows - 1]
        begin, end = np.where(first < low, pieces.n_rows, 0), np.where(last < high, pieces.n_rows, 0)
        for cut in np.flatnonzero((first < low) & (low <= last) | (first < high) & (high <= last)):
            numbers = indices[pieces.rows[cut] :][: pieces.n_rows[cut]]
            begin[cut], end[cut] = np.searchsorted(numbers, (low[cut], high[cut]))
        own = pieces._replace(n_rows=end - begin, rows=pieces.rows + begin)
        return Pieces(*(column[end > begin] for column in own))

    def columns(self, pieces: Pieces) -> _Columns:
        return self._starts[pieces.tensors], self._row_lengths[pieces.tensors], pieces.rows, pieces.units


class _Wire:
    """Pieces one after the other, each without gaps.

    Attributes:
        size: entries so far.
    """

    def __init__(self, target: Narrow) -> None:
        self._unit = target.full.unit
        self.size = 0

    def columns(self, pieces: Pieces) -> _Columns:
        row_lengths = pieces.n_units * self._unit[pieces.tensors]
        ends = self.size + np.cumsum(pieces.n_rows * row_lengths)
        self.size = int(ends[-1]) if len(ends) else self.size
        return ends - pieces.n_rows * row_lengths, row_lengths, COUNTED, COUNTED


_Array = _Stretch | _Shard | _Wire
"""A flat array that holds pieces of tensors."""


def _plan(regions: Regions, target: Narrow, moves: Iterable[tuple[Pieces, _Array, _Array]]) -> BlockPlan:
    """Pieces of ``target`` from arrays that hold them to others, of equal sizes."""
    parts, sizes = [], (0, 0)
    for pieces, source, there in moves:
        grids = *source.columns(pieces), *there.columns(pieces)
        parts.append(np.empty((len(pieces.tensors), WIDTH), np.int64))
        block = target.full.unit[pieces.tensors], pieces.n_units, *grids, pieces.n_rows
        for number, column in enumerate(block):
            parts[-1][:, number] = column
        sizes = source.size, there.size
    return BlockPlan(np.concatenate(parts), regions.indices, sizes)


def shared_plan(target: Narrow, holder: Narrow, owner: tuple[Partition, int]) -> BlockPlan:
    """From ``holder`` to ``target``: the entries that both keep, of the rows that this rank of a partition
    owns.
    """
    regions = Regions(target.selection, [holder.selection], wanted=[0])
    pieces = _Shard(*owner, target).own(regions.of(target.names, 0), regions.indices)
    return _plan(regions, target, [(pieces, holder.among(regions, 0), target.among(regions, None))])


def fetch_plan(
    partition: Partition,
    rank: int,
    target: Narrow,
    holders: Sequence[Narrow] = (),
    regions: Regions | None = None,
    late: Collection[int] = (),
) -> TransferPlan:
    """Plan how ``target`` is filled.

    Args:
        partition: the rows of the store.
        rank: this rank.
        target: the subnet to be filled.
        holders: subnets whose buffers hold valid entries, in order of preference.
        regions: those of the selections of ``target`` and ``holders``, if they are known already.
        late: numbers of holders that hold nothing valid: what they have will be in the store, but is not yet.
    """
    regions = regions or Regions(target.selection, [holder.selection for holder in holders])
    plan = _from_rows(partition, rank, target, regions, [None])
    plan.carried = _carried(regions, target, holders, late)
    if late:
        plan.late = _from_rows(partition, rank, target, regions, late)
    return plan


def fetch_plan_per_rank(
    partition: Partition,
    rank: int,
    targets: Sequence[Narrow],
    holders: Sequence[Narrow] = (),
    late: Collection[int] = (),
) -> TransferPlan:
    """Plan how every rank fills the target of its own.

    Args:
        partition: the rows of the store.
        rank: this rank.
        targets: the subnet of each rank.
        holders: subnets that all ranks have in common, with valid entries, in order of preference.
        late: as in ``fetch_plan``.
    """
    if partition.world_size == 1:
        return fetch_plan(partition, rank, targets[0], holders, late=late)
    shared = [holder.selection for holder in holders]
    divided = [Regions(target.selection, shared) for target in targets]
    target, regions = targets[rank], divided[rank]

    def exchange(holder: int | None) -> Exchange:
        pieces = [of.of(one.names, holder) for one, of in zip(targets, divided, strict=True)]
        packs = [
            _packed(of, _Shard(partition, rank, one), one, found)
            for one, of, found in zip(targets, divided, pieces, strict=True)
        ]
        return Exchange(packs, *_unpacked(regions, partition, target, pieces[rank]))

    plan = TransferPlan(_carried(regions, target, holders, late), exchanges=[exchange(None)])
    if late:
        plan.late = TransferPlan({}, exchanges=[exchange(holder) for holder in late])
    return plan


def return_plan(partition: Partition, rank: int, subnet: Narrow, regions: Regions | None = None) -> BlockPlan:
    """Own rows from (reversed: to) ``subnet``.

    Args:
        partition, rank: as in ``fetch_plan``.
        subnet: what has been trained.
        regions: those of its selection and of the subnets of the next round that train on: for the entries
            that none of them has.
    """
    regions = regions or Regions(subnet.selection)
    return _from_shard(partition, rank, subnet, regions, [None])


def _carried(
    regions: Regions, target: Narrow, holders: Sequence[Narrow], late: Collection[int]
) -> dict[int, BlockPlan]:
    """From the holders that are not ``late``, those that have any."""
    there, plans = target.among(regions, None), {}
    for number, holder in enumerate(holders):
        if number not in late:
            pieces = regions.of(target.names, number)
            plans[number] = _plan(regions, target, [(pieces, holder.among(regions, number), there)])
    return {number: plan for number, plan in plans.items() if plan.entries}


def _from_rows(
    partition: Partition, rank: int, target: Narrow, regions: Regions, holders: Collection[int | None]
) -> TransferPlan:
    """From the rows of every rank to the narrow buffer, which is the same on all: what these holders have."""
    if partition.world_size == 1:
        return TransferPlan({}, _from_shard(partition, rank, target, regions, holders))
    shard, plan = _Shard(partition, rank, target), TransferPlan({})
    for holder in holders:
        pieces = regions.of(target.names, holder)
        for part in batches(_entries(target, pieces), WIRE):
            batch = Pieces(*(column[part] for column in pieces))
            pack = _packed(regions, shard, target, batch)
            plan.exchanges.append(Exchange([pack], *_unpacked(regions, partition, target, batch)))
    return plan


def _from_shard(
    partition: Partition, rank: int, target: Narrow, regions: Regions, holders: Collection[int | None]
) -> BlockPlan:
    """From the rows that ``rank`` owns to the narrow buffer: what these holders have."""
    shard, there = _Shard(partition, rank, target), target.among(regions, None)
    found = (shard.own(regions.of(target.names, holder), regions.indices) for holder in holders)
    return _plan(regions, target, [(pieces, shard, there) for pieces in found])


def _packed(regions: Regions, shard: _Shard, target: Narrow, pieces: Pieces) -> BlockPlan:
    """Own rows to the wire buffer."""
    return _plan(regions, target, [(shard.own(pieces, regions.indices), shard, _Wire(target))])


def _unpacked(
    regions: Regions, partition: Partition, target: Narrow, pieces: Pieces
) -> tuple[BlockPlan, list[int]]:
    """From the wire buffer, owners one after the other, to the narrow buffer; entries of each owner."""
    wire, there = _Wire(target), target.among(regions, None)
    shards = [_Shard(partition, owner, target) for owner in range(partition.world_size)]
    owned = [shard.own(pieces, regions.indices) for shard in shards]
    plan = _plan(regions, target, [(own, wire, there) for own in owned])
    return plan, [int(_entries(target, own).sum()) for own in owned]


def _entries(target: Narrow, pieces: Pieces) -> Numbers:
    return pieces.n_rows * pieces.n_units * target.full.unit[pieces.tensors]
