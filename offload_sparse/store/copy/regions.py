"""Which entries of a subnet already lie in another subnet, and which only the store holds.

A tensor is seen as rows times units (a unit is what lies behind the last dimension that can shrink: the 3x3
window of a convolution). Number the selections 0, 1, …; bit k of a row's code says that selection k keeps the
row, likewise for units. An entry is kept by exactly the selections whose bits are set in both codes:

    row code     0b011  ─┐
    unit code    0b110  ─┴─ and ─▶ 0b010: only selection 1 keeps this entry

Rows with the same code therefore form one rectangle per answer, and every question about shared, fetched and
evicted entries is a look-up per row code instead of a set operation on entries. Rows whose codes differ but
give the same answer for every unit that there is are taken together.

Tensors that name the same atoms in their rows and units (all four of a norm, say) are divided alike, so that
the work is done once for each such pair, and for the positions of all rows and units at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import cache, cached_property, lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload_sparse.channels.channel_map import ALWAYS, Axis, ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.store.copy.blocks import Numbers

_TARGET = 1
STORE = -1
"""In the place of a holder: the store alone has an entry."""

MOST_HOLDERS = 7
"""Bits of a code beside the target's own."""

_Runs = dict[tuple[int, ...], tuple[int, int]]
"""Of some rows or units, by codes: where their positions are, and how many."""


class Tensors(NamedTuple):
    """Full tensors as rows of units, int64 each: the numbers of their pair of rows and units and of the units
    in it, entries per unit and per row."""

    pairs: Numbers
    units: Numbers
    unit: Numbers
    row_length: Numbers


class Geometry:
    """All tensors of a map as rows of units.

    What some dimensions of a tensor, seen as one, are made of counts once, however many tensors name the same
    atoms there.

    Attributes:
        pairs: int64[pairs, 2], the distinct pairs of rows and units, by the numbers of these.
        number_of: int64[positions] of all rows and units, one behind the other: their number.
        within: int64[positions], counted from the first of the same rows or units.
        starts: int64, the first position of each."""

    def __init__(self, channel_map: ChannelMap) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self._atoms: list[list[Numbers]] = []
        pairs: dict[tuple[int, int], int] = {}
        self._shapes = {}
        for name, shape in channel_map.shapes.items():
            axes = channel_map.axes[name]
            last = max((dim for dim, axis in enumerate(axes) if dim and axis is not None), default=0)
            rows = self._number(axes[:1] or (None,), shape[:1] or (1,))
            units = self._number(axes[1 : last + 1], shape[1 : last + 1])
            pair = pairs.setdefault((rows, units), len(pairs))
            self._shapes[name] = pair, units, prod(shape[last + 1 :]), prod(shape[1:])
        self.pairs = np.array(list(pairs), np.int64).reshape(-1, 2)
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
        rows, units: where the numbers of these begin in a stretch of ``Regions.indices``."""

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
        self._holders = [h for h in every if wanted is None or h in wanted]
        alive = [places.alive for places in self._places]
        codes = geometry.spread(np.bitwise_or.reduce([kept << bit for bit, kept in enumerate(alive)]))
        kept = np.flatnonzero(codes & _TARGET)
        keys = (geometry.number_of[kept] << 8) + codes[kept]
        order = keys.argsort(kind="stable")
        keys, self._kept = keys[order], [kept[order]]
        self._size = len(kept)
        firsts = np.flatnonzero(np.diff(keys, prepend=-1))
        runs = np.stack([keys[firsts] >> 8, keys[firsts] & 255, firsts, np.diff(firsts, append=len(keys))], 1)
        found = self._divide(runs, {STORE if h is None else h for h in self._holders})
        # Ordered by holder and pair: n_rows, n_units, rows and units; and how many these are, and the first.
        parts = (found[:, 0] - STORE) * len(geometry.pairs) + found[:, 1]
        self._found = found[parts.argsort(kind="stable"), 2:].T
        counts = np.bincount(parts, minlength=len(every) * len(geometry.pairs))
        self._counts = counts.reshape(len(every), -1)
        self._firsts = (np.cumsum(counts) - counts).reshape(len(every), -1)

    def of(self, names: tuple[str, ...], holder: int | None) -> Pieces:
        """What ``holder``, one that is asked for, has of these tensors; none of them empty."""
        pairs, number = self._geometry.tensors(names).pairs, 0 if holder is None else holder - STORE
        counts = self._counts[number, pairs]
        tensors = np.repeat(np.arange(len(names)), counts)
        firsts = self._firsts[number, pairs] - (np.cumsum(counts) - counts)
        return Pieces(tensors, *self._found[:, firsts[tensors] + np.arange(len(tensors))])

    @cached_property
    def indices(self) -> Numbers:
        """Numbers of rows and units in stretches of equal length: those in the full tensors, in the target,
        and in the holders that are asked for."""
        kept, held = np.concatenate(self._kept), (h for h in self._holders if h is not None)
        narrow = [self._places[0], *(self._places[1 + h] for h in held)]
        return np.concatenate([self._geometry.within[kept], *(places.before[kept] for places in narrow)])

    def stretch(self, holder: int | None) -> int:
        """Where that of a holder begins; of None that of the target."""
        held = [h for h in self._holders if h is not None]
        return (1 if holder is None else 2 + held.index(holder)) * self._size

    def fetched(self, names: Iterable[str]) -> int:
        """How many entries of these tensors no holder has."""
        names = tuple(names)
        pieces = self.of(names, None)
        return int(pieces.n_rows * pieces.n_units @ self._geometry.tensors(names).unit[pieces.tensors])

    def _divide(self, runs: Numbers, wanted: set[int]) -> Numbers:
        """int64[rectangles, 6]: holder, pair, n_rows, n_units, and where the numbers of rows and of units
        are. Most rows and units have a single code: pairs of these are one rectangle.

        Args:
            runs: int64[runs, 4]: number of rows or units, code, where the positions that have it are, and how
                many.
            wanted: the holders whose rectangles are found for certain."""
        holders, pairs, size = len(self._places) - 1, self._geometry.pairs, len(self._geometry.starts)
        alone = np.full((size, 4), -1)
        alone[runs[:, 0]] = runs
        alone[np.bincount(runs[:, 0], minlength=size) > 1] = -1
        single = (alone[pairs, 0] >= 0).all(1)
        rows, units = alone[pairs[single]].transpose(1, 2, 0)
        holder = _first_holders(holders)[rows[1] & units[1]]
        found = np.stack([holder, np.flatnonzero(single), rows[3], units[3], rows[2], units[2]], 1)
        known: list[_Runs] = [{} for _ in range(size)]
        for number, code, first, count in runs.tolist():
            known[number][code,] = first, count
        present = [tuple([code for (code,) in of_one]) for of_one in known]
        several = []
        for pair in np.flatnonzero(~single).tolist():
            row, unit = pairs[pair].tolist()
            for number, of_rows, of_units in _divided(holders, present[row], present[unit]):
                if number in wanted:
                    at, n_rows = self._where(known[row], of_rows)
                    there, n_units = self._where(known[unit], of_units)
                    several.append((number, pair, n_rows, n_units, at, there))
        return np.concatenate([found, np.array(several, np.int64).reshape(-1, 6)])

    def _where(self, known: _Runs, codes: tuple[int, ...]) -> tuple[int, int]:
        """Where the positions with one of ``codes`` are, in order, and how many."""
        if codes not in known:
            runs = (known[code,] for code in codes)
            together = np.sort(np.concatenate([self._kept[0][at : at + count] for at, count in runs]))
            self._kept.append(together)
            known[codes] = self._size, len(together)
            self._size += len(together)
        return known[codes]


@lru_cache(1 << 12)
def _divided(
    holders: int, rows: tuple[int, ...], units: tuple[int, ...]
) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """The regions of a tensor with these codes of rows and of units: holder, codes of its rows and units."""
    first = _first_holders(holders).tolist()
    alike: dict[tuple[int, ...], list[int]] = {}
    for code in rows:
        alike.setdefault(tuple([first[code & other] for other in units]), []).append(code)
    found: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for answers, codes in alike.items():
        for holder in sorted(set(answers)):
            chosen = tuple([c for c, answer in zip(units, answers, strict=True) if answer == holder])
            found.append((holder, tuple(codes), chosen))
    return found


@cache
def _first_holders(holders: int) -> Numbers:
    """int64[256], by code: the lowest of so many holders (bit 1 is holder 0) whose bit is set; ``STORE`` when
    none is."""
    held = [(code >> 1) & ((1 << holders) - 1) for code in range(256)]
    return np.array([(bits & -bits).bit_length() - 1 for bits in held])
