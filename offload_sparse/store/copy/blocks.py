"""Blocks of flat arrays: which entries of one array belong to which entries of another.

    Block: 2 rows x 2 units of 3 entries        unit numbers  0   1   2   3
    source  row 0   . . . . . . . . . . . .
            row 1   . . . a a a . . . b b b     rows 1 and 3, units 1 and 3, row_length 12
            row 2   . . . . . . . . . . . .
            row 3   . . . c c c . . . d d d
    target  a a a b b b c c c d d d             rows and units None, row_length 6

A unit is a run that is always contiguous: the 3x3 window of a convolution, or a whole row when every column
is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")

Numbers = NDArray[np.int64]


class Grid(NamedTuple):
    """Where the entries of a block lie in a flat array.

    Attributes:
        start: first entry of row 0.
        row_length: entries per row of the array.
        rows: sorted row numbers; None: 0, 1, 2, …
        units: sorted numbers of units within a row; None: 0, 1, 2, …"""

    start: int
    row_length: int
    rows: Numbers | None = None
    units: Numbers | None = None


class Block(NamedTuple):
    """``n_rows`` x ``n_units`` x ``unit`` contiguous entries, in the same order in both arrays."""

    n_rows: int
    n_units: int
    unit: int
    source: Grid
    target: Grid

    def check(self) -> None:
        """Raise ValueError: the numbers of rows or units are not as many as there are."""
        for grid in (self.source, self.target):
            for numbers, count in ((grid.rows, self.n_rows), (grid.units, self.n_units)):
                if numbers is not None and len(numbers) != count:
                    size = f"{self.n_rows} rows x {self.n_units} units"
                    raise ValueError(f"a block of {size} names {len(numbers)} of them")

    @property
    def entries(self) -> int:
        return self.n_rows * self.n_units * self.unit

    def end(self, grid: Grid) -> int:
        """One past the last entry of the array that the block touches."""
        row = self.n_rows - 1 if grid.rows is None else int(grid.rows.max())
        unit = self.n_units - 1 if grid.units is None else int(grid.units.max())
        return grid.start + row * grid.row_length + (unit + 1) * self.unit

    def begin(self, grid: Grid) -> int:
        """First entry of the array that the block touches."""
        row = 0 if grid.rows is None else int(grid.rows.min())
        unit = 0 if grid.units is None else int(grid.units.min())
        return grid.start + row * grid.row_length + unit * self.unit

    def is_run(self, grid: Grid) -> bool:
        """Whether the block is one run of the array."""
        one_row = grid.rows is None and (grid.row_length == self.n_units * self.unit or self.n_rows == 1)
        return one_row and grid.units is None


COUNTED = -1
"""In a table, the place of numbers 0, 1, 2, …, which need none."""

UNIT, N_UNITS, SOURCE, TARGET, N_ROWS, WIDTH = 0, 1, 2, 6, 10, 11
"""Columns of a table; a grid has those of its start, its row length, and the places of its row and unit
numbers."""

PLACES = (4, 5, 8, 9)
"""Those that hold places."""


class Table(NamedTuple):
    """Blocks as numbers.

    Attributes:
        columns: int64[blocks, WIDTH]; a grid has the places of its row and unit numbers in ``indices``.
        indices: int64."""

    columns: Numbers
    indices: Numbers

    @staticmethod
    def of(blocks: Sequence[Block]) -> Table:
        """That of ``blocks``; those that share numbers share their place."""
        places, chunks, size = {id(None): COUNTED}, [np.zeros(0, np.int64)], 0
        rows = []
        for n_rows, n_units, unit, *sides in blocks:
            row = [unit, n_units]
            for start, row_length, *numbers in sides:
                for own in numbers:
                    if own is not None and id(own) not in places:
                        places[id(own)] = size
                        chunks.append(own)
                        size += len(own)
                row += [start, row_length, *(places[id(own)] for own in numbers)]
            rows.append([*row, n_rows])
        return Table(np.array(rows, np.int64).reshape(-1, WIDTH), np.concatenate(chunks))

    def blocks(self) -> list[Block]:
        """The blocks; those that share a place share their numbers."""
        known: dict[tuple[int, int], Numbers] = {}

        def numbers(at: int, count: int) -> Numbers | None:
            if at != COUNTED and (at, count) not in known:
                known[at, count] = self.indices[at : at + count]
            return known.get((at, count))

        found = []
        for unit, n_units, *grids, n_rows in self.columns.tolist():
            sides = [
                Grid(start, row_length, numbers(rows, n_rows), numbers(units, n_units))
                for start, row_length, rows, units in (grids[:4], grids[4:])
            ]
            found.append(Block(n_rows, n_units, unit, *sides))
        return found


class BlockPlan:
    """Blocks of all tensors, ready to be copied any number of times, for weights and every optimizer slot.
    Raises ValueError: a block begins before the array, or names too many rows or units.

    Args:
        blocks: the blocks, or the table of some that all hold entries.
        sizes: entries of the source and the target, from a caller who knows that all blocks lie within them;
            None: look at all numbers.

    Attributes:
        entries: entries that are copied.
        source_size, target_size: least number of entries of the arrays (or ``sizes``).
        sent: the ``DeviceTables`` by the device that has them."""

    def __init__(self, blocks: Sequence[Block] | Table, sizes: tuple[int, int] | None = None) -> None:
        if isinstance(blocks, Table):
            columns = blocks.columns
            self.table = blocks
            self.entries = int(columns[:, UNIT] * columns[:, N_UNITS] @ columns[:, N_ROWS])
        else:
            counts = [n_rows * n_units * unit for n_rows, n_units, unit, *_ in blocks]
            self.blocks = tuple(compress(blocks, counts))
            self.entries = sum(counts)
        self._derived: dict[tuple[object, ...], Any] = {}
        self.sent: dict[torch.device, Any] = {}
        if sizes is not None:
            self.source_size, self.target_size = sizes
            return
        for block in self.blocks:
            block.check()
        self.source_size = max((b.end(b.source) for b in self.blocks), default=0)
        self.target_size = max((b.end(b.target) for b in self.blocks), default=0)
        lows = [b.begin(g) for b in self.blocks for g in (b.source, b.target)]
        if min(lows, default=0) < 0:
            raise ValueError(f"a block begins at entry {min(lows)}; give starts and numbers of 0 or more")

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Those that hold any entries."""
        return tuple(self.table.blocks())

    @cached_property
    def table(self) -> Table:
        """That of the blocks."""
        return Table.of(self.blocks)

    def derived(self, make: Callable[..., T], *arguments: object) -> T:
        """``make(blocks, *arguments)``, worked out when it is first asked for: tables of a kernel, say."""
        key = make, *arguments
        if key not in self._derived:
            self._derived[key] = make(self.blocks, *arguments)
        return self._derived[key]

    @cached_property
    def source_run(self) -> tuple[int, int] | None:
        """(first, last + 1) entry of the source if the blocks fill one run of it in order, else None."""
        return _run([(b, b.source) for b in self.blocks])

    @cached_property
    def target_run(self) -> tuple[int, int] | None:
        """The same of the target."""
        return _run([(b, b.target) for b in self.blocks])


def _run(grids: Sequence[tuple[Block, Grid]]) -> tuple[int, int] | None:
    if not grids:
        return 0, 0
    first = end = grids[0][1].start
    for block, grid in grids:
        if not block.is_run(grid) or grid.start != end:
            return None
        end += block.entries
    return first, end
