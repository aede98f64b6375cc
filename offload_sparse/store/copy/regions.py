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
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.channel_map import Axis, ChannelMap
from offload_sparse.channels.selection import Selection

Codes = NDArray[np.uint8]

Dimensions = tuple[int, ...]
"""Some dimensions of a tensor, seen as one: their axes by identity, or -size where every position is always
kept; equal for tensors that name the same atoms there. The axes of a map live as long as the map.
"""

_TARGET = 1
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
    """The unit shapes of all tensors of a map by name, and their axes by identity."""

    def __init__(self, channel_map: ChannelMap) -> None:
        self.axes: dict[int, NDArray[np.int64]] = {}
        self.shapes = {name: self._of(channel_map, name) for name in channel_map.shapes}

    def _of(self, channel_map: ChannelMap, name: str) -> UnitShape:
        shape, axes = channel_map.shapes[name], channel_map.axes[name]
        if not shape:
            return UnitShape((-1,), (), 1, 1)
        last = max((dim for dim, axis in enumerate(axes) if dim and axis is not None), default=0)
        rows = self._dimensions(axes[:1], shape[:1])
        units = self._dimensions(axes[1 : last + 1], shape[1 : last + 1])
        return UnitShape(rows, units, prod(shape[last + 1 :]), prod(shape[1:]))

    def _dimensions(self, axes: Sequence[Axis], shape: Sequence[int]) -> Dimensions:
        self.axes |= {id(axis): axis.numpy() for axis in axes if axis is not None}
        return tuple(-size if axis is None else id(axis) for axis, size in zip(axes, shape, strict=True))

    def spread(self, codes: Codes, dimensions: Dimensions) -> Codes:
        """uint8[positions]: the bits of ``codes`` (uint8[ids + 2], as ``ChannelMap.alive``) that a position
        has in all of its dimensions; all bits where it is always kept."""
        found = np.full(1, 255, np.uint8)
        for key in dimensions:
            axis = np.full(-key, 255, np.uint8) if key <= 0 else codes[self.axes[key]]
            found = axis if len(found) == 1 else (found[:, None] & axis).reshape(-1)
        return found


class Region(NamedTuple):
    """A rectangle of entries of one tensor that one selection keeps and that come from the same place.

    Attributes:
        holder: number of the selection that holds them, or None: the store alone does.
        rows: int64, sorted row numbers of the full tensor; tensors that they hold for share them.
        units: int64, sorted unit numbers within a full row, likewise."""

    holder: int | None
    rows: Tensor
    units: Tensor


class Places:
    """What a selection keeps of every row and unit, and where that lies in its narrow tensors."""

    def __init__(self, selection: Selection) -> None:
        channel_map = selection.channel_map
        if channel_map not in _geometries:
            _geometries[channel_map] = Geometry(channel_map)
        self.geometry = _geometries[channel_map]
        self.alive = selection.alive.numpy().view(np.uint8)
        self._before: dict[Dimensions, NDArray[np.int64]] = {}
        # The positions are held, too, so that their id stays theirs.
        self._known: dict[tuple[Dimensions, int], tuple[Tensor, Tensor]] = {}

    def of(self, dimensions: Dimensions, positions: Tensor) -> Tensor:
        """int64: the numbers of kept ``positions`` in the narrow tensors."""
        known = self._known.get((dimensions, id(positions)))
        if known is None:
            if dimensions not in self._before:
                kept = self.geometry.spread(self.alive, dimensions) != 0
                self._before[dimensions] = np.cumsum(kept, dtype=np.int64) - 1
            numbers = torch.from_numpy(self._before[dimensions][positions.numpy()])
            known = self._known[dimensions, id(positions)] = positions, numbers
        return known[1]


_geometries: weakref.WeakKeyDictionary[ChannelMap, Geometry] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[Selection, Places] = weakref.WeakKeyDictionary()


def places_of(selection: Selection) -> Places:
    """The places of a selection, worked out once."""
    if selection not in _places:
        _places[selection] = Places(selection)
    return _places[selection]


class Regions:
    """The entries of ``target``, divided by the first of ``holders``, selections of the same map in order of
    preference (at most ``MOST_HOLDERS``), that has them."""

    def __init__(self, target: Selection, holders: Sequence[Selection] = ()) -> None:
        assert len(holders) <= MOST_HOLDERS
        self._geometry = places_of(target).geometry
        self._shapes = self._geometry.shapes
        alive = [places_of(selection).alive for selection in (target, *holders)]
        self._codes: Codes = np.bitwise_or.reduce([kept << np.uint8(bit) for bit, kept in enumerate(alive)])
        self._classes: dict[Dimensions, _Classes] = {}
        self._found: dict[tuple[Dimensions, Dimensions], list[Region]] = {}
        self._first = _first_holder(len(holders))

    def of(self, name: str) -> list[Region]:
        """The regions of tensor ``name``, without empty ones."""
        shape = self._shapes[name]
        key = shape.rows, shape.units
        if key not in self._found:  # tensors with the same axes (all four of a norm, say) share theirs
            self._found[key] = list(self._divide(self._class(shape.rows), self._class(shape.units)))
        return self._found[key]

    def fetched(self, names: Iterable[str]) -> int:
        """How many entries of these tensors no holder has."""
        return sum(
            len(region.rows) * len(region.units) * self._shapes[name].unit
            for name in names
            for region in self.of(name)
            if region.holder is None
        )

    def _divide(self, rows: _Classes, units: _Classes) -> Iterator[Region]:
        alike: dict[tuple[int, ...], list[int]] = {}
        for code in rows.present:
            answers = tuple([self._first[code & other] for other in units.present])
            alike.setdefault(answers, []).append(code)
        for answers, codes in alike.items():
            of_rows = rows.where(tuple(codes))
            for holder in sorted(set(answers)):
                chosen = [c for c, answer in zip(units.present, answers, strict=True) if answer == holder]
                yield Region(None if holder < 0 else holder, of_rows, units.where(tuple(chosen)))

    def _class(self, dimensions: Dimensions) -> _Classes:
        if dimensions not in self._classes:
            self._classes[dimensions] = _Classes(self._geometry.spread(self._codes, dimensions))
        return self._classes[dimensions]


class _Classes:
    """Positions by code.

    Attributes:
        present: codes with the target's bit that occur, in order."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        counts = np.bincount(codes, minlength=256)[_TARGET::2]
        self.present: list[int] = (2 * np.flatnonzero(counts) + _TARGET).tolist()
        self._known: dict[tuple[int, ...], Tensor] = {}

    def where(self, codes: tuple[int, ...]) -> Tensor:
        """int64, sorted: the positions whose code is one of ``codes``."""
        if codes not in self._known:
            wanted = self._codes == codes[0]
            for code in codes[1:]:
                wanted |= self._codes == code
            self._known[codes] = torch.from_numpy(np.flatnonzero(wanted))
        return self._known[codes]


def _first_holder(count: int) -> list[int]:
    """For every code, the lowest holder (bit 1 is holder 0) whose bit is set; -1 when none is."""
    bits = [(code >> 1) & ((1 << count) - 1) for code in range(256)]
    return [(held & -held).bit_length() - 1 for held in bits]
