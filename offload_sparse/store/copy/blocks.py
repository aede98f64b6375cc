"""Blocks of flat arrays: which entries of one array belong to which entries of another.

    a block: 2 rows x 2 units of 3 entries      unit numbers  0   1   2   3
    source  row 0   . . . . . . . . . . . .
            row 1   . . . a a a . . . b b b     rows 1 and 3, units 1 and 3, row_length 12
            row 2   . . . . . . . . . . . .
            row 3   . . . c c c . . . d d d
    target  a a a b b b c c c d d d             rows 0 and 1, units 0 and 1, row_length 6

A unit is a run that is always contiguous: the 3x3 window of a convolution, or a whole row when every column
is kept. Numbers of rows and units stand in one array, the indices, where blocks that have the same share
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")

Numbers = NDArray[np.int64]

UNIT, N_UNITS, SOURCE, TARGET, N_ROWS, WIDTH = 0, 1, 2, 6, 10, 11
"""Columns of the table of a plan, in the order of ``Block``; a grid has four, in the order of ``Grid``."""

ROWS = 2
"""Column of a grid that holds the place of its row numbers."""

COUNTED = 0
"""Place of 0, 1, 2, … in the indices, as many as any block has rows or units."""


class Grid(NamedTuple):
    """Where the entries of a block lie in a flat array.

    Attributes:
        start: first entry of row 0.
        row_length: entries per row of the array.
        rows, units: where the numbers of its rows, and of its units within a row, begin in the indices; both
            ascend."""

    start: int
    row_length: int
    rows: int
    units: int


class Block(NamedTuple):
    """``n_rows`` x ``n_units`` x ``unit`` entries, in the same order in both arrays."""

    unit: int
    n_units: int
    source: Grid
    target: Grid
    n_rows: int


class BlockPlan:
    """Blocks of all tensors, ready to be copied any number of times, for weights and every optimizer slot.

    Args:
        columns: int64[blocks, WIDTH], none of them empty.
        indices: int64, begins with 0, 1, 2, …; see ``COUNTED``.
        sizes: entries of the source and of the target, which the blocks do not leave.

    Attributes:
        entries: entries that are copied.
        sent: the ``DeviceTables`` by the device that has them."""

    def __init__(self, columns: Numbers, indices: Numbers, sizes: tuple[int, int]) -> None:
        self.columns, self.indices = columns, indices
        self.source_size, self.target_size = sizes
        self.entries = int(self.counts.sum())
        self.sent: dict[torch.device, Any] = {}
        self._derived: dict[tuple[object, ...], Any] = {}

    @property
    def counts(self) -> Numbers:
        """Entries of each block."""
        return self.columns[:, (UNIT, N_UNITS, N_ROWS)].prod(1)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, one by one."""
        return [
            Block(unit, n_units, Grid(*sides[:4]), Grid(*sides[4:]), n_rows)
            for unit, n_units, *sides, n_rows in self.columns.tolist()
        ]

    def numbers(self, place: int, count: int) -> Numbers:
        """So many numbers of rows or units."""
        return self.indices[place : place + count]

    def ends(self, grid: int) -> tuple[Numbers, Numbers]:
        """int64[blocks] each: the first entry of ``SOURCE`` or ``TARGET`` that a block touches, and one past
        the last."""
        unit, n_units, n_rows = self.columns[:, (UNIT, N_UNITS, N_ROWS)].T
        start, row_length, rows, units = self.columns[:, grid : grid + 4].T
        first_row, first_unit = self.indices[rows], self.indices[units]
        last_row, last_unit = self.indices[rows + n_rows - 1], self.indices[units + n_units - 1]
        first = start + first_row * row_length + first_unit * unit
        return first, start + last_row * row_length + (last_unit + 1) * unit

    def run(self, grid: int) -> slice | None:
        """That of ``SOURCE`` or ``TARGET``, if the blocks, of which there are some, fill one in order."""
        first, end = self.ends(grid)
        filled = (end - first).sum() == self.entries and (first[1:] == end[:-1]).all()
        return slice(int(first[0]), int(end[-1])) if filled else None

    def derived(self, make: Callable[..., T], *arguments: object) -> T:
        """``make(plan, *arguments)``, worked out when it is first asked for: tables of a kernel, say."""
        key = make, *arguments
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
        return self._derived[key]


def part_of_matrix(shape: tuple[int, int, int], rows: Numbers, units: Numbers) -> BlockPlan:
    """From these rows and units of a matrix [rows, units, entries per unit] to an array without gaps."""
    unit, n_rows, n_units = shape[2], len(rows), len(units)
    counted = np.arange(max(n_rows, n_units))
    source = 0, shape[1] * unit, len(counted), len(counted) + n_rows
    block = unit, n_units, *source, 0, n_units * unit, COUNTED, COUNTED, n_rows
    sizes = prod(shape), n_rows * n_units * unit
    return BlockPlan(np.array([block]), np.concatenate([counted, rows, units]), sizes)


def batches(counts: Numbers, most: int) -> Iterator[slice]:
    """Blocks of so many entries each, in runs of at most ``most`` entries (or one block)."""
    cuts, held = [0], 0
    for number, entries in enumerate(counts.tolist()):
        if held and held + entries > most:
            cuts.append(number)
            held = 0
        held += entries
    yield from (slice(*run) for run in pairwise([*cuts, len(counts)]) if run[1])
