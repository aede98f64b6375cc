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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np

from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.store.copy.blocks import Block, BlockPlan, Grid, Numbers
from offload_sparse.store.copy.regions import Regions, places_of
from offload_sparse.store.partition import Partition

WIRE = 1 << 24
"""Entries per wire buffer, unless a single tensor needs more."""

Piece = tuple[str, Numbers, Numbers]
"""Part of a tensor: its name, and numbers of rows and of units in the full one."""


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
        carried: per holder, from its narrow buffer to the target's.
        fetched: own rows to the narrow buffer; a single rank needs nothing else.
        exchanges: the same over several ranks.
    """

    carried: dict[int, BlockPlan]
    fetched: BlockPlan | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def own_entries(self) -> int:
        """Entries that leave this rank's rows."""
        packs = [pack for exchange in self.exchanges for pack in exchange.packs]
        return sum(plan.entries for plan in (*packs, self.fetched) if plan is not None)


class _Array(Protocol):
    """A flat array that holds pieces of tensors."""

    def grid(self, name: str, rows: Numbers, units: Numbers) -> Grid:
        """Where it holds these rows and units of the full tensor ``name``."""


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
        self._places = places_of(selection)
        self.shapes = self._places.geometry.shapes
        self._row_lengths = {name: prod(self.layout.shapes[name][1:]) for name in self.names}

    def grid(self, name: str, rows: Numbers, units: Numbers) -> Grid:
        of_rows, of_units = self._places.of(self.shapes[name], rows, units)
        return Grid(self.layout.offsets[name], self._row_lengths[name], of_rows, of_units)

    def blocks(self, source: _Array, target: _Array, pieces: Iterable[Piece]) -> list[Block]:
        """``pieces`` from one array that holds them to another."""
        shapes, source_at, target_at = self.shapes, source.grid, target.grid
        return [
            Block(
                len(rows),
                len(units),
                shapes[name].unit,
                source_at(name, rows, units),
                target_at(name, rows, units),
            )
            for name, rows, units in pieces
        ]


class _Shard:
    """The rows of the store that a rank owns."""

    def __init__(self, partition: Partition, rank: int, subnet: Narrow) -> None:
        self._partition, self._rank, self._shapes = partition, rank, subnet.shapes
        self.layout = partition.shard(rank)

    def own(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """What the rank owns of ``pieces``; numbers are the same object where that is all of them."""
        return pieces if self._partition.world_size == 1 else self._among(pieces)

    def _among(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for name, rows, units in pieces:
            first, last = np.searchsorted(rows, self._partition.rows(name, self._rank))
            rows = rows if last - first == len(rows) else rows[first:last]
            if len(rows):
                yield name, rows, units

    def grid(self, name: str, rows: Numbers, units: Numbers) -> Grid:
        low = self._partition.rows(name, self._rank)[0]
        return Grid(
            self.layout.offsets[name], self._shapes[name].row_length, rows - low if low else rows, units
        )


class _Wire:
    """Pieces one after the other, each without gaps.

    Attributes:
        size: entries so far.
    """

    def __init__(self, subnet: Narrow) -> None:
        self._shapes = subnet.shapes
        self.size = 0

    def grid(self, name: str, rows: Numbers, units: Numbers) -> Grid:
        grid = Grid(self.size, len(units) * self._shapes[name].unit)
        self.size += len(rows) * grid.row_length
        return grid


def shared_plan(
    target: Narrow,
    holder: Narrow,
    regions: Regions | None = None,
    owner: tuple[Partition, int] | None = None,
) -> BlockPlan:
    """From ``holder`` to ``target``: the entries that both keep.

    Args:
        target, holder: the buffers.
        regions: those of their selections, if they are known already.
        owner: only entries of the rows that this rank of a partition owns.
    """
    regions = regions or Regions(target.selection, [holder.selection], wanted=[0])
    pieces = _divided(target, regions)[1].get(0, [])
    if owner is not None:
        pieces = list(_Shard(*owner, target).own(pieces))
    return BlockPlan(target.blocks(holder, target, pieces), (holder.layout.size, target.layout.size))


def fetch_plan(
    partition: Partition,
    rank: int,
    target: Narrow,
    holders: Sequence[Narrow] = (),
    regions: Regions | None = None,
) -> TransferPlan:
    """Plan how ``target`` is filled.

    Args:
        partition: the rows of the store.
        rank: this rank.
        target: the subnet to be filled.
        holders: subnets whose buffers hold valid entries, in order of preference.
        regions: those of the selections of ``target`` and ``holders``, if they are known already.
    """
    regions = regions or Regions(target.selection, [holder.selection for holder in holders])
    fetched, carried = _divided(target, regions)
    plan = TransferPlan(_carried(target, holders, carried))
    if partition.world_size == 1:
        plan.fetched = _from_shard(partition, rank, target, fetched)
        return plan
    shard = _Shard(partition, rank, target)
    for batch in _batches(target, fetched):
        plan.exchanges.append(Exchange([_packed(shard, target, batch)], *_unpacked(partition, target, batch)))
    return plan


def fetch_plan_per_rank(
    partition: Partition, rank: int, targets: Sequence[Narrow], holders: Sequence[Narrow] = ()
) -> TransferPlan:
    """Plan how every rank fills the target of its own.

    Args:
        partition: the rows of the store.
        rank: this rank.
        targets: the subnet of each rank.
        holders: subnets that all ranks have in common, with valid entries, in order of preference.
    """
    if partition.world_size == 1:
        return fetch_plan(partition, rank, targets[0], holders)
    shared = [holder.selection for holder in holders]
    divided = [_divided(target, Regions(target.selection, shared)) for target in targets]
    packs = [
        _packed(_Shard(partition, rank, target), target, fetched)
        for target, (fetched, _) in zip(targets, divided, strict=True)
    ]
    target, (fetched, carried) = targets[rank], divided[rank]
    exchange = Exchange(packs, *_unpacked(partition, target, fetched))
    return TransferPlan(_carried(target, holders, carried), exchanges=[exchange])


def return_plan(
    partition: Partition,
    rank: int,
    subnet: Narrow,
    keepers: Sequence[Narrow] = (),
    regions: Regions | None = None,
) -> BlockPlan:
    """Own rows from (reversed: to) ``subnet``, for the entries that none of ``keepers`` has.

    Args:
        partition, rank: as in ``fetch_plan``.
        subnet: what has been trained.
        keepers: subnets of the next round that train on.
        regions: those of the selections of ``subnet`` and ``keepers``, if they are known already.
    """
    regions = regions or Regions(subnet.selection, [k.selection for k in keepers], wanted=[None])
    return _from_shard(partition, rank, subnet, _divided(subnet, regions)[0])


def _divided(target: Narrow, regions: Regions) -> tuple[list[Piece], dict[int, list[Piece]]]:
    """What only the store has, and what each holder has."""
    fetched: list[Piece] = []
    carried: dict[int, list[Piece]] = {}
    for name in target.names:
        for holder, rows, units in regions.of(name):
            if holder is None:
                fetched.append((name, rows, units))
            elif holder in carried:
                carried[holder].append((name, rows, units))
            else:
                carried[holder] = [(name, rows, units)]
    return fetched, carried


def _carried(
    target: Narrow, holders: Sequence[Narrow], carried: dict[int, list[Piece]]
) -> dict[int, BlockPlan]:
    size = target.layout.size
    return {
        number: BlockPlan(target.blocks(holders[number], target, found), (holders[number].layout.size, size))
        for number, found in carried.items()
    }


def _from_shard(partition: Partition, rank: int, target: Narrow, pieces: Iterable[Piece]) -> BlockPlan:
    """From the rows that ``rank`` owns to the narrow buffer."""
    shard = _Shard(partition, rank, target)
    blocks = target.blocks(shard, target, shard.own(pieces))
    return BlockPlan(blocks, (shard.layout.size, target.layout.size))


def _packed(shard: _Shard, target: Narrow, pieces: Iterable[Piece]) -> BlockPlan:
    """Own rows to the wire buffer."""
    wire = _Wire(target)
    return BlockPlan(target.blocks(shard, wire, shard.own(pieces)), (shard.layout.size, wire.size))


def _unpacked(partition: Partition, target: Narrow, pieces: Sequence[Piece]) -> tuple[BlockPlan, list[int]]:
    """From the wire buffer, owners one after the other, to the narrow buffer; entries of each owner."""
    wire, blocks, ends = _Wire(target), list[Block](), [0]
    for owner in range(partition.world_size):
        blocks += target.blocks(wire, target, _Shard(partition, owner, target).own(pieces))
        ends.append(wire.size)
    return BlockPlan(blocks, (wire.size, target.layout.size)), np.diff(ends).tolist()


def _batches(target: Narrow, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in runs of at most ``WIRE`` entries (or one piece)."""
    batch: list[Piece] = []
    held = 0
    for name, rows, units in pieces:
        entries = len(rows) * len(units) * target.shapes[name].unit
        if batch and held + entries > WIRE:
            yield batch
            batch, held = [], 0
        batch.append((name, rows, units))
        held += entries
    if batch:
        yield batch
