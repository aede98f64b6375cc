"""Which entries of a subnet already lie in another subnet, and which only the store holds.

A tensor is seen as rows times units (a unit is what lies behind the last dimension that can shrink: the 3x3
window of a convolution). Number the selections 0, 1, …; bit k of a row's code says that selection k keeps the
row, likewise for units. An entry is kept by exactly the selections whose bits are set in both codes:

    row code     0b011  ─┐
    unit code    0b110  ─┴─ and ─▶ 0b010: only selection 1 keeps this entry

Rows with the same code therefore form one rectangle per answer, and every question about shared, fetched and
evicted entries is a look-up per row code instead of a set operation on entries. Rows whose codes differ but
give the same answer for every unit that there is are taken together.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload_sparse.channels.channel_map import Axis, ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.store.copy.blocks import Numbers

Codes = NDArray[np.uint8]

Dimensions = tuple[int, ...]
"""Some dimensions of a tensor, seen as one: for each the number of its axis among the distinct ones of the
map, or -1 - size where every position is always kept; equal for tensors that name the same atoms there.
"""

_TARGET = 1
_EVERY = 255
MOST_HOLDERS = 7
"""Bits of a code beside the target's own."""


class UnitShape(NamedTuple):
    """A full tensor as rows of units (``unit`` entries each, ``row_length`` entries per row), and which
    dimensions these are made of; the same for every mask."""

    rows: Dimensions
    units: Dimensions
    unit: int
    row_length: int


class Geometry:
    """The unit shapes of all tensors of a map by name."""

    def __init__(self, channel_map: ChannelMap) -> None:
        self.axes = channel_map.distinct_axes
        self.bounds = self.axes.starts.tolist()
        self.shapes = {name: self._of(channel_map, name) for name in channel_map.shapes}

    def _of(self, channel_map: ChannelMap, name: str) -> UnitShape:
        shape, axes = channel_map.shapes[name], channel_map.axes[name]
        if not shape:
            return UnitShape((-2,), (), 1, 1)
        last = max((dim for dim, axis in enumerate(axes) if dim and axis is not None), default=0)
        rows = self._dimensions(axes[:1], shape[:1])
        units = self._dimensions(axes[1 : last + 1], shape[1 : last + 1])
        return UnitShape(rows, units, prod(shape[last + 1 :]), prod(shape[1:]))

    def _dimensions(self, axes: Sequence[Axis], shape: Sequence[int]) -> Dimensions:
        numbers = self.axes.numbers
        return tuple(numbers.get(id(axis), -1 - size) for axis, size in zip(axes, shape, strict=True))

    def spread(self, codes: Codes, dimensions: Dimensions) -> Codes:
        """uint8[positions]: the bits that a position has in all of its dimensions, of ``codes`` (uint8, by
        position of the distinct axes); all bits where it is always kept."""
        found = np.full(1, _EVERY, np.uint8)
        for key in dimensions:
            if key < 0:
                axis = np.full(-1 - key, _EVERY, np.uint8)
            else:
                axis = codes[self.bounds[key] : self.bounds[key + 1]]
            found = axis if len(found) == 1 else (found[:, None] & axis).reshape(-1)
        return found


class Region(NamedTuple):
    """A rectangle of entries of one tensor that one selection keeps and that come from the same place.

    Attributes:
        holder: number of the selection that holds them, or None: the store alone does.
        rows: sorted row numbers of the full tensor; tensors that they hold for share them.
        units: sorted unit numbers within a full row, likewise."""

    holder: int | None
    rows: Numbers
    units: Numbers


class Places:
    """What a selection keeps of every row and unit, and where that lies in its narrow tensors."""

    def __init__(self, selection: Selection) -> None:
        channel_map = selection.channel_map
        if channel_map not in _geometries:
            _geometries[channel_map] = Geometry(channel_map)
        self.geometry = _geometries[channel_map]
        self.alive = selection.alive.numpy().view(np.uint8)
        self._kept_before = selection.kept_before
        self._before: dict[Dimensions, Numbers] = {}
        # Positions are of one place in a tensor only; they are held, too, so that their id stays theirs.
        self._known: dict[int, tuple[Numbers, Numbers]] = {}
        self._pairs: dict[tuple[int, int], tuple[Numbers, Numbers]] = {}

    def of(self, shape: UnitShape, rows: Numbers, units: Numbers) -> tuple[Numbers, Numbers]:
        """The numbers of kept rows and units in the narrow tensors; those that share them share these."""
        key = id(rows), id(units)
        found = self._pairs.get(key)
        if found is None:
            found = self._pairs[key] = self._of(shape.rows, rows), self._of(shape.units, units)
        return found

    def _of(self, dimensions: Dimensions, positions: Numbers) -> Numbers:
        known = self._known.get(id(positions))
        if known is None:
            before = self._before.get(dimensions)
            if before is None:
                before = self._before[dimensions] = self._kept(dimensions)
            known = self._known[id(positions)] = before[positions], positions
        return known[0]

    def _kept(self, dimensions: Dimensions) -> Numbers:
        """int64[positions]: how many positions before each are kept."""
        if len(dimensions) == 1 and dimensions[0] >= 0:
            start, stop = self.geometry.bounds[dimensions[0] : dimensions[0] + 2]
            return self._kept_before[start:stop] - self._kept_before[start]
        kept = self.geometry.spread(np.diff(self._kept_before).astype(np.uint8), dimensions) != 0
        return np.cumsum(kept, dtype=np.int64) - kept


_geometries: weakref.WeakKeyDictionary[ChannelMap, Geometry] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[Selection, Places] = weakref.WeakKeyDictionary()


def places_of(selection: Selection) -> Places:
    """The places of a selection, worked out once."""
    if selection not in _places:
        _places[selection] = Places(selection)
    return _places[selection]


class Regions:
    """The entries of ``target``, divided by the first of ``holders``, selections of the same map in order of
    preference (at most ``MOST_HOLDERS``), that has them.

    Args:
        target, holders: the selections.
        wanted: the holders (None: the store) whose entries are asked for; all if None."""

    def __init__(
        self,
        target: Selection,
        holders: Sequence[Selection] = (),
        wanted: Collection[int | None] | None = None,
    ) -> None:
        assert len(holders) <= MOST_HOLDERS
        self._geometry = places_of(target).geometry
        self._wanted = wanted
        self._holders = len(holders)
        alive = [places_of(selection).alive for selection in (target, *holders)]
        codes = np.bitwise_or.reduce([kept << np.uint8(bit) for bit, kept in enumerate(alive)])
        self._codes: Codes = codes[self._geometry.axes.atoms]
        self._present = self._of_axes()
        self._classes: dict[Dimensions, _Classes] = {}
        self._found: dict[tuple[Dimensions, Dimensions], list[Region]] = {}

    def of(self, name: str) -> list[Region]:
        """The regions of tensor ``name``, without empty ones."""
        key = self._geometry.shapes[name][:2]
        found = self._found.get(key)
        if found is None:  # tensors with the same axes (all four of a norm, say) share theirs
            rows, units = map(self._class, key)
            found = self._found[key] = [
                Region(holder, rows.where(of_rows), units.where(of_units))
                for holder, of_rows, of_units in _divided(self._holders, rows.present, units.present)
                if self._wanted is None or holder in self._wanted
            ]
        return found

    def fetched(self, names: Iterable[str]) -> int:
        """How many entries of these tensors no holder has."""
        return sum(
            len(region.rows) * len(region.units) * self._geometry.shapes[name].unit
            for name in names
            for region in self.of(name)
            if region.holder is None
        )

    def _of_axes(self) -> list[tuple[int, ...]]:
        """For every distinct axis the codes with the target's bit that occur."""
        axes = self._geometry.axes
        counts = np.bincount((axes.axis_of << 8) + self._codes, minlength=len(axes.numbers) << 8)
        present: list[list[int]] = [[] for _ in axes.numbers]
        for number, code in zip(*np.nonzero(counts.reshape(-1, 256)[:, _TARGET::2]), strict=True):
            present[number].append(2 * int(code) + _TARGET)
        return list(map(tuple, present))

    def _class(self, dimensions: Dimensions) -> _Classes:
        found = self._classes.get(dimensions)
        if found is None:
            codes = self._geometry.spread(self._codes, dimensions)
            if len(dimensions) == 1 and dimensions[0] >= 0:
                present = self._present[dimensions[0]]
            else:
                present = tuple(np.unique(codes[codes % 2 == _TARGET]).tolist())
            found = self._classes[dimensions] = _Classes(codes, present)
        return found


class _Classes:
    """Positions by code; ``present`` are the codes with the target's bit that occur, in order."""

    def __init__(self, codes: Codes, present: tuple[int, ...]) -> None:
        self._codes, self.present = codes, present
        self._known: dict[tuple[int, ...], Numbers] = {}

    def where(self, codes: tuple[int, ...]) -> Numbers:
        """Sorted: the positions whose code is one of ``codes``."""
        known = self._known.get(codes)
        if known is None:
            wanted = self._codes == codes[0]
            for code in codes[1:]:
                wanted |= self._codes == code
            known = self._known[codes] = wanted.nonzero()[0]
        return known


@lru_cache(1 << 12)
def _divided(
    holders: int, rows: tuple[int, ...], units: tuple[int, ...]
) -> list[tuple[int | None, tuple[int, ...], tuple[int, ...]]]:
    """The regions of a tensor with these codes of rows and of units: holder, codes of its rows and units."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for code in rows:
        answers = tuple([_first_holder(holders, code & other) for other in units])
        alike.setdefault(answers, []).append(code)
    found: list[tuple[int | None, tuple[int, ...], tuple[int, ...]]] = []
    for answers, codes in alike.items():
        for holder in sorted(set(answers)):
            chosen = tuple([c for c, answer in zip(units, answers, strict=True) if answer == holder])
            found.append((None if holder < 0 else holder, tuple(codes), chosen))
    return found


def _first_holder(holders: int, code: int) -> int:
    """The lowest of so many holders (bit 1 is holder 0) whose bit is set; -1 when none is."""
    held = (code >> 1) & ((1 << holders) - 1)
    return (held & -held).bit_length() - 1
