"""How one subnet follows another: what stays on the device, what comes from the store, what goes back.

    subnets of the last round   a ───┐ carried: device to device
                                b ───┤
    subnet of the next round         └─▶ target ◀── fetched: from the rows of every rank
    subnets of the last round   a, b ─▶ returned: entries that no subnet of the next round trains ─▶ own rows

Fetching over several ranks: every rank packs its own entries into its segment of a wire buffer, the segments
are broadcast, and each rank unpacks all of them. Tensors go in batches, which bounds the wire buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.store.copy.copy import Block, BlockPlan, Grid
from offload_sparse.store.copy.regions import Places, Positions, Region, Regions
from offload_sparse.store.partition import Partition

WIRE = 1 << 24
"""Entries per wire buffer, unless a single tensor needs more."""


@dataclass
class Parcel:
    """A batch of tensors on the way from their owners.

    Attributes:
        pack: own rows to the wire buffer.
        unpack: wire buffer to the narrow buffer.
        segments: half-open range of the wire buffer per rank.
    """

    pack: BlockPlan
    unpack: BlockPlan
    segments: list[tuple[int, int]]


@dataclass
class Dispatch:
    """Entries on the way to ranks of which each fills a subnet of its own.

    Attributes:
        packs: per destination, own rows to the wire buffer for it.
        unpack: what this rank receives, owners one after the other, to its narrow buffer.
        received: entries that it receives from each owner.
    """

    packs: list[BlockPlan]
    unpack: BlockPlan
    received: list[int]


@dataclass
class Arrival:
    """How the entries of one subnet come about, for arrays of one layout.

    Attributes:
        carried: per holder, from its narrow buffer to the target's.
        fetched: own rows to the narrow buffer; a single rank needs nothing else.
        parcels: the same over several ranks.
        dispatch: the same over several ranks with targets of their own.
        own_entries: entries that leave this rank's rows.
    """

    carried: dict[int, BlockPlan] = field(default_factory=dict)
    fetched: BlockPlan | None = None
    parcels: list[Parcel] = field(default_factory=list)
    dispatch: Dispatch | None = None
    own_entries: int = 0


class Narrow:
    """A selection together with the layout of some of its tensors in one flat buffer.

    Args:
        selection: what is kept, or the places of a selection (several buffers of one subnet share them).
        names: the tensors, in buffer order.
    """

    def __init__(self, selection: Selection | Places, names: Iterable[str]) -> None:
        self.places = selection if isinstance(selection, Places) else Places(selection)
        self.selection = self.places.selection
        self.names = tuple(names)
        self.layout: Layout = self.selection.layout(self.names)
        shapes = self.layout.shapes
        self._row_lengths = {name: prod(shapes[name][1:]) for name in self.names}

    def grid(self, name: str, rows: Positions, units: Positions) -> Grid:
        """Full ``rows`` and ``units`` of tensor ``name``, as places in the narrow buffer."""
        places, shape = self.places, self.places.geometry[name]
        return Grid(
            self.layout.offsets[name],
            self._row_lengths[name],
            places.of(shape.rows, rows),
            places.of(shape.units, units),
        )


def regions_of(target: Narrow, holders: Sequence[Narrow] = ()) -> Regions:
    """What ``target`` keeps, by the first of ``holders`` that has it; any buffers of the same selections."""
    return Regions(target.places, [holder.places for holder in holders])


def shared(target: Narrow, holder: Narrow, regions: Regions | None = None) -> BlockPlan:
    """From ``holder`` to ``target``: the entries that both keep.

    Args:
        target, holder: the buffers.
        regions: ``regions_of(target, [holder])``, if it is known already.
    """
    regions = regions or regions_of(target, [holder])
    blocks = [
        _block(holder, target, name, region)
        for name in target.names
        for region in regions.of(name)
        if region.holder is not None
    ]
    return BlockPlan(blocks, (holder.layout.size, target.layout.size))


def arrival(
    partition: Partition,
    rank: int,
    target: Narrow,
    holders: Sequence[Narrow] = (),
    regions: Regions | None = None,
) -> Arrival:
    """Plan how ``target`` is filled.

    Args:
        partition: the rows of the store.
        rank: this rank.
        target: the subnet to be filled.
        holders: subnets whose buffers hold valid entries, in order of preference.
        regions: ``regions_of(target, holders)``, if it is known already.
    """
    fetched, carried = _divided(target, holders, regions)
    result = Arrival(carried)
    if partition.world_size == 1:
        result.fetched = _store_plan(partition, rank, target, fetched)
        result.own_entries = result.fetched.entries
    else:
        result.parcels = [_parcel(partition, rank, target, batch) for batch in _batches(target, fetched)]
        result.own_entries = sum(parcel.pack.entries for parcel in result.parcels)
    return result


def arrival_per_rank(
    partition: Partition, rank: int, targets: Sequence[Narrow], holders: Sequence[Narrow] = ()
) -> Arrival:
    """Plan how every rank fills the target of its own.

    Args:
        partition: the rows of the store.
        rank: this rank.
        targets: the subnet of each rank.
        holders: subnets that all ranks have in common, with valid entries, in order of preference.
    """
    carried: dict[int, BlockPlan] = {}
    packs: list[BlockPlan] = []
    unpack: list[Block] = []
    received: list[int] = []
    for destination, target in enumerate(targets):
        wanted, plans = _divided(target, holders)
        packs.append(BlockPlan(_packed(partition, rank, target, wanted)))
        if destination == rank:
            carried = plans
            end = 0
            for owner in range(partition.world_size):
                parts = _unpacked(partition, owner, target, wanted, end)
                received.append(sum(b.n_rows * b.n_units * b.unit for b in parts))
                end += received[-1]
                unpack += parts
    own = sum(plan.entries for plan in packs)
    return Arrival(carried, dispatch=Dispatch(packs, BlockPlan(unpack), received), own_entries=own)


def returned(
    partition: Partition,
    rank: int,
    subnet: Narrow,
    keepers: Sequence[Narrow] = (),
    regions: Regions | None = None,
) -> BlockPlan:
    """Own rows from (reversed: to) ``subnet``, for the entries that none of ``keepers`` has.

    Args:
        partition, rank: as in ``arrival``.
        subnet: what has been trained.
        keepers: subnets that carry on.
        regions: ``regions_of(subnet, keepers)``, if it is known already.
    """
    regions = regions or regions_of(subnet, keepers)
    leaving = [(n, region) for n in subnet.names for region in regions.of(n) if region.holder is None]
    return _store_plan(partition, rank, subnet, leaving)


def _divided(
    target: Narrow, holders: Sequence[Narrow], regions: Regions | None = None
) -> tuple[list[tuple[str, Region]], dict[int, BlockPlan]]:
    """What only the store has, and per holder what is carried over from it."""
    regions = regions or regions_of(target, holders)
    carried: dict[int, list[Block]] = {}
    fetched: list[tuple[str, Region]] = []
    for name in target.names:
        for region in regions.of(name):
            if region.holder is None:
                fetched.append((name, region))
            else:
                block = _block(holders[region.holder], target, name, region)
                carried.setdefault(region.holder, []).append(block)
    size = target.layout.size
    return fetched, {h: BlockPlan(found, (holders[h].layout.size, size)) for h, found in carried.items()}


def _block(source: Narrow, target: Narrow, name: str, region: Region) -> Block:
    rows, units = region.rows, region.units
    unit = source.places.geometry[name].unit
    return Block(len(rows), len(units), unit, source.grid(name, rows, units), target.grid(name, rows, units))


def _store_plan(
    partition: Partition, rank: int, target: Narrow, regions: Sequence[tuple[str, Region]]
) -> BlockPlan:
    """From the rows that ``rank`` owns to the narrow buffer."""
    shard = partition.shard(rank)
    blocks = []
    for name, region in regions:
        rows = _own(partition, rank, name, region.rows)
        if len(rows):
            source = _store_grid(partition, shard, rank, target, name, rows, region.units)
            unit = target.places.geometry[name].unit
            there = target.grid(name, rows, region.units)
            blocks.append(Block(len(rows), len(region.units), unit, source, there))
    return BlockPlan(blocks, (shard.size, target.layout.size))


def _parcel(partition: Partition, rank: int, target: Narrow, regions: Sequence[tuple[str, Region]]) -> Parcel:
    unpack: list[Block] = []
    segments: list[tuple[int, int]] = []
    end = 0
    for owner in range(partition.world_size):
        parts = _unpacked(partition, owner, target, regions, end)
        size = sum(b.n_rows * b.n_units * b.unit for b in parts)
        segments.append((end, end + size))
        end += size
        unpack += parts
    pack = _packed(partition, rank, target, regions, segments[rank][0])
    return Parcel(BlockPlan(pack), BlockPlan(unpack), segments)


def _packed(
    partition: Partition, rank: int, target: Narrow, regions: Sequence[tuple[str, Region]], first: int = 0
) -> list[Block]:
    """Own rows to the wire buffer, from entry ``first`` on."""
    shard, blocks = partition.shard(rank), []
    for (name, region), rows, wire in _on_the_wire(partition, rank, target, regions, first):
        own = _store_grid(partition, shard, rank, target, name, rows, region.units)
        unit = target.places.geometry[name].unit
        blocks.append(Block(len(rows), len(region.units), unit, own, wire))
    return blocks


def _unpacked(
    partition: Partition, owner: int, target: Narrow, regions: Sequence[tuple[str, Region]], first: int
) -> list[Block]:
    """The owner's part of the wire buffer, from entry ``first`` on, to the narrow buffer."""
    blocks = []
    for (name, region), rows, wire in _on_the_wire(partition, owner, target, regions, first):
        unit = target.places.geometry[name].unit
        there = target.grid(name, rows, region.units)
        blocks.append(Block(len(rows), len(region.units), unit, wire, there))
    return blocks


def _on_the_wire(
    partition: Partition, owner: int, target: Narrow, regions: Sequence[tuple[str, Region]], first: int
) -> Iterator[tuple[tuple[str, Region], Positions, Grid]]:
    """(tensor and region, the owner's rows of it, their place on the wire), one after the other."""
    for name, region in regions:
        rows = _own(partition, owner, name, region.rows)
        if len(rows):
            length = len(region.units) * target.places.geometry[name].unit
            yield (name, region), rows, Grid(first, length, None, None)
            first += len(rows) * length


def _batches(target: Narrow, regions: Sequence[tuple[str, Region]]) -> Iterator[list[tuple[str, Region]]]:
    """Regions in runs of at most ``WIRE`` entries (or one region)."""
    batch: list[tuple[str, Region]] = []
    held = 0
    for name, region in regions:
        entries = len(region.rows) * len(region.units) * target.places.geometry[name].unit
        if batch and held + entries > WIRE:
            yield batch
            batch, held = [], 0
        batch.append((name, region))
        held += entries
    if batch:
        yield batch


def _own(partition: Partition, rank: int, name: str, rows: Positions) -> Positions:
    """Those of ``rows`` that belong to ``rank``; the same object where that is all of them."""
    low, high = partition.rows(name, rank)
    first, last = np.searchsorted(rows.numbers, (low, high)) if partition.world_size > 1 else (0, len(rows))
    return rows if last - first == len(rows) else Positions(rows.numbers[first:last])


def _store_grid(
    partition: Partition,
    shard: Layout,
    rank: int,
    target: Narrow,
    name: str,
    rows: Positions,
    units: Positions,
) -> Grid:
    low = partition.rows(name, rank)[0]
    own = torch.from_numpy(rows.numbers - low) if low else rows.tensor
    return Grid(shard.offsets[name], target.places.geometry[name].row_length, own, units.tensor)
