"""Which entries of a subnet already lie in another subnet, and which only the store holds.

A tensor is seen as rows times units (a unit is what lies behind the last dimension that can shrink: the 3x3
window of a convolution). Number the holders 0, 1, …; bit k of a row's code says that holder k keeps the row,
likewise for units. Holder k has an entry if both codes have bit k, and is the first to have it if they have
no lower bit in common. Rows whose codes are equal up to bit k therefore share their units of it:

    codes of rows up to bit 1    0b10               ×  units  0b?1? = those of holder 1
                                 0b11               ×  units  0b?10 = those of holder 1 and not of holder 0

Each line is a rectangle of every tensor, and so are the lines of what no holder has. Rows and units that are
made of the same atoms count once, and all rectangles of all tensors are found at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import cache, cached_property
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload_sparse.channels.channel_map import ALWAYS, Axis, ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.store.copy.blocks import Numbers

_TARGET = 1
"""Bit of what the target keeps, beside those of the holders."""

MOST_HOLDERS = 7
"""As many as a byte has room for."""


class Tensors(NamedTuple):
    """Full tensors as rows of units, int64 each: the numbers of these rows and of these units, entries per
    unit and per row."""

    rows: Numbers
    units: Numbers
    unit: Numbers
    row_length: Numbers


class Geometry:
    """All tensors of a map as rows of units.

    What some dimensions of a tensor, seen as one, are made of counts once, however many tensors name the same
    atoms there.

    Attributes:
        meet: bool[numbers, numbers], the pairs of rows and units of all tensors.
        number_of: int64[positions] of all rows and units, one behind the other: their number.
        within: int64[positions], counted from the first of the same rows or units.
        starts: int64, the first position of each."""

    def __init__(self, channel_map: ChannelMap) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self._atoms: list[list[Numbers]] = []
        self._shapes = {}
        for name, shape in channel_map.shapes.items():
            axes = channel_map.axes[name]
            last = max((dim for dim, axis in enumerate(axes) if dim and axis is not None), default=0)
            rows = self._number(axes[:1] or (None,), shape[:1] or (1,))
            units = self._number(axes[1 : last + 1], shape[1 : last + 1])
            self._shapes[name] = rows, units, prod(shape[last + 1 :]), prod(shape[1:])
        self.meet = np.zeros((len(self._atoms), len(self._atoms)), bool)
        for rows, units, *_ in self._shapes.values():
            self.meet[rows, units] = True
        self._known: dict[tuple[str, ...], Tensors] = {}
        sizes = [len(atoms[0]) for atoms in self._atoms]
        self.starts = np.cumsum([0, *sizes])[:-1]
        self.number_of = np.repeat(np.arange(len(sizes)), sizes)
        self.within = np.arange(sum(sizes)) - np.repeat(self.starts, sizes)
        # Nearly all have a single dimension with atoms.
        self._first = np.concatenate([atoms[0] for atoms in self._atoms])
        self._further = [
            (slice(start, start + size), further)
            for start, size, (_, *rest) in zip(self.starts, sizes, self._atoms, strict=True)
            for further in rest
        ]

    def tensors(self, names: tuple[str, ...]) -> Tensors:
        """Those of ``names``, in order."""
        if names not in self._known:
            found = np.array([self._shapes[name] for name in names], np.int64).reshape(-1, 4)
            self._known[names] = Tensors(*found.T.copy())
        return self._known[names]

    def spread(self, alive: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8[positions]: the bits that a position has in all of its dimensions, of those of every atom."""
        found = alive[self._first]
        for part, atoms in self._further:
            found[part] &= alive[atoms]
        return found

    def _number(self, axes: Sequence[Axis], shape: Sequence[int]) -> int:
        key = tuple(-size if axis is None else id(axis) for axis, size in zip(axes, shape, strict=True))
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            own = [
                np.broadcast_to(axis.numpy().reshape(-1, *[1] * (len(shape) - dim - 1)), shape).ravel()
                for dim, axis in enumerate(axes)
                if axis is not None
            ]
            self._atoms.append(own or [np.full(prod(shape), ALWAYS)])
        return self._numbers[key]


class Places:
    """What a selection keeps of every atom, and of the positions of all rows and units.

    Attributes:
        geometry: that of its map.
        alive: uint8 by atom.
        before: int64[positions], how many are kept of the same rows or units before it.
        counts: int64, how many are kept of each rows or units."""

    def __init__(self, selection: Selection) -> None:
        channel_map = selection.channel_map
        if channel_map not in _geometries:
            _geometries[channel_map] = Geometry(channel_map)
        geometry = self.geometry = _geometries[channel_map]
        self.alive = selection.alive.numpy().view(np.uint8)
        kept = np.zeros(len(geometry.number_of) + 1, np.int64)
        np.cumsum(geometry.spread(self.alive), out=kept[1:])
        first = kept[geometry.starts]
        self.before = kept[:-1] - first[geometry.number_of]
        self.counts = np.diff(first, append=kept[-1])


_geometries: weakref.WeakKeyDictionary[ChannelMap, Geometry] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[Selection, Places] = weakref.WeakKeyDictionary()


def places_of(selection: Selection) -> Places:
    """The places of a selection, worked out once."""
    if selection not in _places:
        _places[selection] = Places(selection)
    return _places[selection]


class Pieces(NamedTuple):
    """Rectangles of tensors, int64 each.

    Attributes:
        tensors: number of the tensor of each, in ascending order.
        n_rows, n_units: how many of these it has.
        rows, units: where the numbers of these, in the full tensors, begin in ``Regions.indices``."""

    tensors: Numbers
    n_rows: Numbers
    n_units: Numbers
    rows: Numbers
    units: Numbers


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
        self._places = [places_of(selection) for selection in (target, *holders)]
        geometry = self._geometry = self._places[0].geometry
        every = (None, *range(len(holders)))
        self._holders = tuple([h for h in every if wanted is None or h in wanted])
        self._holder_of, codes = _cases(len(holders), self._holders)
        alive = [places.alive << bit for bit, places in enumerate(self._places)]
        bits = geometry.spread(np.bitwise_or.reduce(alive))
        kept = np.flatnonzero(bits & _TARGET)
        held, numbers = bits[kept] >> 1, geometry.number_of[kept]
        keys = (numbers << len(holders)) + held
        found = np.bincount(keys, minlength=len(geometry.starts) << len(holders))
        codes_of = (len(geometry.starts), 1 << len(holders))
        order = keys.astype(np.min_scalar_type(len(found))).argsort(kind="stable")
        # By kind of set, case, and number: how many, whether of several codes, and where they are if not.
        counts, codes_there, firsts = (
            codes.astype(np.int64) @ of_codes.reshape(codes_of).T
            for of_codes in (found, found > 0, (found.cumsum() - found) * (found > 0))
        )
        several = codes_there > 1
        several[0] &= counts[1].astype(bool) @ geometry.meet.T
        several[1] &= counts[0].astype(bool) @ geometry.meet
        together = self._together(np.nonzero(several), codes, held)
        firsts[several] = len(kept) + np.cumsum(counts[several]) - counts[several]
        self._kept = np.concatenate([kept[order], kept[together]])
        self._counted = np.arange(self._places[0].counts.max())
        self._counts, self._firsts = counts.ravel(), firsts.ravel() + len(self._counted)
        self._known: dict[tuple[str, ...], tuple[Pieces, dict[int | None, slice]]] = {}

    def _together(self, sets: tuple[Numbers, ...], codes: NDArray[np.bool_], held: Numbers) -> Numbers:
        """The places in ``held`` of what is in each of some sets of several codes, in order."""
        kind, case, number = sets
        sizes = self._places[0].counts
        sizes, starts = sizes[number], (sizes.cumsum() - sizes)[number]
        which = np.arange(len(number)).repeat(sizes)
        places = np.arange(len(which)) + (starts - sizes.cumsum() + sizes)[which]
        return places[codes[kind, case][which, held[places]]]

    def of(self, names: tuple[str, ...], holder: int | None) -> Pieces:
        """What ``holder``, one that is asked for, has of these tensors; none of them empty."""
        if names not in self._known:
            self._known[names] = self._divided(self._geometry.tensors(names))
        pieces, whose = self._known[names]
        return Pieces(*(column[whose[holder]] for column in pieces))

    def _divided(self, full: Tensors) -> tuple[Pieces, dict[int | None, slice]]:
        """What all holders that are asked for have of the tensors, and which of it is whose."""
        size, cases = len(self._geometry.starts), len(self._holder_of)
        case = np.arange(cases)[:, None] * size
        rows, units = case + full.rows, case + full.units + cases * size
        n_rows, n_units = self._counts[rows], self._counts[units]
        case, tensors = np.nonzero(n_rows * n_units)
        holder = self._holder_of[case]
        order = (holder * len(full.rows) + tensors).argsort(kind="stable")
        at = case[order], tensors[order]
        ends = holder[order].searchsorted(np.arange(len(self._holders) + 1)).tolist()
        whose = {h: slice(*part) for h, part in zip(self._holders, pairwise(ends), strict=True)}
        return Pieces(at[1], n_rows[at], n_units[at], self._firsts[rows[at]], self._firsts[units[at]]), whose

    @cached_property
    def indices(self) -> Numbers:
        """Those of plans: 0, 1, 2, …, then the numbers of rows and units in stretches of equal length: those
        in the full tensors, in the target, and in the holders that are asked for."""
        narrow = [self._places[0], *(self._places[1 + h] for h in self._holders if h is not None)]
        numbers = self._geometry.within, *(places.before for places in narrow)
        return np.concatenate([self._counted, *(from_first[self._kept] for from_first in numbers)])

    def stretch(self, holder: int | None) -> int:
        """How far that of a holder is from the first one; of None that of the target."""
        held = [h for h in self._holders if h is not None]
        return (1 if holder is None else 2 + held.index(holder)) * len(self._kept)

    def fetched(self, names: Iterable[str]) -> int:
        """How many entries of these tensors no holder has."""
        names = tuple(names)
        pieces = self.of(names, None)
        return int(pieces.n_rows * pieces.n_units @ self._geometry.tensors(names).unit[pieces.tensors])


@cache
def _cases(holders: int, wanted: tuple[int | None, ...]) -> tuple[Numbers, NDArray[np.bool_]]:
    """The lines of the picture above: int64[cases], the place in ``wanted`` of whose each is, ascending, and
    bool[2, cases, 2^holders], the codes that are equal to its own in the bits that matter, and those that
    have no bit in common with it but that of the holder."""
    every, places, found = np.arange(1 << holders), [], []
    for place, holder in enumerate(wanted):
        bits, own = (holders, 0) if holder is None else (holder + 1, 1 << holder)
        for code in range(1 << bits):
            if code & own == own:
                places.append(place)
                found.append([every & ((1 << bits) - 1) == code, every & code == own])
    return np.array(places), np.array(found).swapaxes(0, 1).copy()
