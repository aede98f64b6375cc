"""Blocks as kernels read them: tables of numbers.

The native kernel's, adjacent units merged, work cut into items:

    items     block, rows [from, to), units [from, to)      about ITEM entries each: what threads share out
    blocks    unit, position of run lengths, and for each array: start, row length, positions of rows and of
              units, whether to look ahead in this array, and whether it is the other one and its units
              leave no gaps; positions are those in
    indices   one int64 array: row numbers, offsets of units within a row (in entries), run lengths

A device's, in its own memory, so that a copy sends nothing there:

    programs  block and its range of entries
    blocks    unit, units per row, and for each array: start, row length, positions of rows and of units in
    indices   one int64 array of row and unit numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import (
    COUNTED,
    N_ROWS,
    N_UNITS,
    PLACES,
    UNIT,
    Block,
    Grid,
    Numbers,
    Table,
)

# Columns of the native kernel's tables, all int64. numba keeps what it compiled until native.py changes:
# whoever moves a column changes a line there too.
ITEM_BLOCK, ITEM_ROW, ITEM_ROW_END, ITEM_UNIT, ITEM_UNIT_END, ITEM_WIDTH = 0, 1, 2, 3, 4, 5
BLOCK_UNIT, BLOCK_LENGTHS, SOURCE, TARGET, BLOCK_WIDTH = 0, 1, 2, 8, 14
GRID_START, GRID_ROW_LENGTH, GRID_ROWS, GRID_UNITS, GRID_AHEAD, GRID_DENSE = 0, 1, 2, 3, 4, 5
CALL_ITEMS, CALL_BLOCKS, CALL_INDICES = 0, 1, 2  # addresses of the tables
CALL_FROM, CALL_TO, CALL_SIZE = 3, 4, 5  # addresses of the arrays, bytes per entry
CALL_FROM_GRID, CALL_TO_GRID = 6, 7  # SOURCE and TARGET, or the other way round
CALL_COUNT, CALL_NEXT = 8, 9  # items, and the next that nobody has taken
CALL_STREAM, CALL_WIDTH = 10, 11  # whether to write past the caches

ITEM = 1 << 17
"""Entries per work item, roughly."""

LONGEST_RUN = 1 << 16
"""Longer runs are cut, so that several threads can share them."""

RUN_FROM = 64
"""Mean entries of a run from which runs of their own lengths are faster than units of one length."""


class Tables:
    """Blocks for the native kernel: int64[items, ITEM_WIDTH], int64[blocks, BLOCK_WIDTH], int64[*] indices,
    and where each begins in memory."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._chunks: list[Numbers] = []
        self._size = 0
        self._known: dict[tuple[int, ...], tuple[tuple[int, ...], object]] = {}
        self._items: list[tuple[int, ...]] = []
        rows = [self._block(number, _without_full_rows(block)) for number, block in enumerate(blocks)]
        self.blocks = np.array(rows, np.int64).reshape(-1, BLOCK_WIDTH)
        self.items = np.array(self._items, np.int64).reshape(-1, ITEM_WIDTH)
        self.indices = np.concatenate([np.zeros(0, np.int64), *self._chunks])
        self.addresses = (_address(self.items), _address(self.blocks), _address(self.indices))
        del self._chunks, self._known, self._items

    def call(self, source: Tensor, target: Tensor, reverse: bool, stream: bool) -> Numbers:
        """What the kernel takes to copy all items once between two flat arrays of one dtype (back if
        ``reverse``), int64[CALL_WIDTH]; ``stream`` writes past the caches where that is possible."""
        arrays, grids = [source.data_ptr(), target.data_ptr()], [SOURCE, TARGET]
        if reverse:
            arrays.reverse()
            grids.reverse()
        size, count = source.element_size(), len(self.items)
        return np.array([*self.addresses, *arrays, size, *grids, count, 0, stream], np.int64)

    def _block(self, number: int, block: Block) -> tuple[int, ...]:
        unit, lengths_at, count, mean, source_at, target_at = self._units_of(block)
        self._add_items(number, block.n_rows, count, mean)
        # The narrow array of the two lies in the caches sooner: what is worth looking ahead in is the other.
        wider = block.source.row_length >= block.target.row_length
        source = self._grid(block.source, source_at, wider)
        target = self._grid(block.target, target_at, not wider)
        return unit, lengths_at, *source, *target

    def _units_of(self, block: Block) -> tuple[int, ...]:
        """Unit, position of run lengths (-1: none), units or runs per row, mean entries of one, and positions
        of their offsets in source and target; tensors that keep the same units share them."""
        source, target = block.source.units, block.target.units
        key = (block.n_units, block.unit, id(source), id(target))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._add_units(block), (source, target)
        return known[0]

    def _add_units(self, block: Block) -> tuple[int, ...]:
        source, target = _units(block.source, block.n_units), _units(block.target, block.n_units)
        unit, breaks = block.unit, _breaks(source, target)
        runs = len(breaks) + 1
        if len(source) * unit < RUN_FROM * runs and _some_unit_alone(breaks):
            at = self._add(source * unit if unit > 1 else source), self._add(target * unit)
            return unit, -1, len(source), unit, *at
        lengths = np.diff(breaks, prepend=0, append=len(source))
        step = int(np.gcd.reduce(lengths))  # runs that are all multiples of some units make longer units
        source, target = (side[::step] * unit for side in (source, target))
        unit, lengths = unit * step, lengths // step
        if len(source) * unit < RUN_FROM * runs:
            return unit, -1, len(source), unit, self._add(source), self._add(target)
        first = np.cumsum(lengths) - lengths
        source, target, lengths = _cut(source[first], target[first], lengths * unit)
        lengths_at, mean = self._add(lengths), int(lengths.mean())
        return unit, lengths_at, len(lengths), mean, self._add(source), self._add(target)

    def _grid(self, grid: Grid, units_at: int, ahead: bool) -> tuple[int, ...]:
        rows_at = -1 if grid.rows is None else self._shared(grid.rows)
        dense = not ahead and _consecutive(grid)  # of the wider array nobody asks
        return grid.start, grid.row_length, rows_at, units_at, int(ahead), int(dense)

    def _add_items(self, number: int, n_rows: int, n_units: int, mean: int) -> None:
        entries = n_rows * n_units * mean
        if entries <= ITEM:
            self._items.append((number, 0, n_rows, 0, n_units))
            return
        units = n_units if n_units * mean < 2 * ITEM else max(1, ITEM // mean)
        rows = max(1, ITEM // (n_units * mean))
        for row in range(0, n_rows, rows):
            row_end = min(n_rows, row + rows)
            for first in range(0, n_units, units):
                last = min(n_units, first + units)
                self._items.append((number, row, row_end, first, last))

    def _shared(self, numbers: Numbers) -> int:
        """Position of numbers that several blocks may share; they are kept alive, so that ids stay theirs."""
        key = (id(numbers),)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = (self._add(numbers),), numbers
        return known[0][0]

    def _add(self, numbers: Numbers) -> int:
        self._chunks.append(numbers)
        self._size += len(numbers)
        return self._size - len(numbers)


class DeviceTables(NamedTuple):
    """Blocks for a kernel on a device: int64[programs, 3], int64[blocks, 10], int64[*]."""

    programs: Tensor
    blocks: Tensor
    indices: Tensor

    @staticmethod
    def of(tables: Sequence[Table], device: torch.device, program: int) -> list[DeviceTables]:
        """Those of several plans of at least one block each, sent in one piece; plans with the same indices
        share them.

        Args:
            tables: the blocks of each.
            device: where the tables shall be.
            program: entries per program."""
        if any((table.columns[:, PLACES] == COUNTED).any() for table in tables):
            tables = [_spelled_out(table) for table in tables]
        indices = {id(table.indices): table.indices for table in tables}
        columns = np.concatenate([table.columns for table in tables])
        blocks = np.array([len(table.columns) for table in tables])
        entries = columns[:, UNIT] * columns[:, N_UNITS] * columns[:, N_ROWS]
        counts = -(-entries // program)
        ends = counts.cumsum()
        number = np.arange(len(columns)).repeat(counts)
        first = (np.arange(len(number)) - (ends - counts)[number]) * program
        own = np.arange(len(columns)) - np.repeat(blocks.cumsum() - blocks, blocks)
        programs = np.stack([own[number], first, np.minimum(first + program, entries[number])], 1)
        parts = [*indices.values(), programs.ravel(), columns[:, :N_ROWS].ravel()]
        sizes = [len(part) for part in indices.values()]
        sizes += (3 * np.diff(ends[blocks.cumsum() - 1], prepend=0)).tolist() + (N_ROWS * blocks).tolist()
        sent = to_device(torch.from_numpy(np.concatenate(parts)), device).split(sizes)
        there, sent = dict(zip(indices, sent, strict=False)), sent[len(indices) :]
        return [
            DeviceTables(programs.view(-1, 3), blocks.view(-1, N_ROWS), there[id(table.indices)])
            for table, programs, blocks in zip(tables, sent, sent[len(tables) :], strict=False)
        ]


def _spelled_out(table: Table) -> Table:
    """With a place for rows and units that are 0, 1, 2, …, too."""
    columns, indices = table
    places = columns[:, PLACES]
    if not (counted := places == COUNTED).any():
        return table
    columns = columns.copy()
    columns[:, PLACES] = np.where(counted, len(indices), places)
    count = columns[:, (N_ROWS, N_UNITS)].max()
    return Table(columns, np.append(indices, np.arange(count)))


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers in a device's memory, sent without waiting for what the device does."""
    if device.type == "cpu":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def used_now(numbers: Tensor) -> None:
    """Keep what ``to_device`` has sent from being reused before work now given to the current stream is done:
    it may have been sent on another."""
    if numbers.device.type == "cuda":
        numbers.record_stream(torch.cuda.current_stream(numbers.device))


def _address(table: Numbers) -> int:
    return int(table.ctypes.data)


def _without_full_rows(block: Block) -> Block:
    """Where both arrays hold whole rows, every row is a unit and the block a single row."""
    length, source, target = block.n_units * block.unit, block.source, block.target
    if source.row_length != length or target.row_length != length:  # so many sorted units are all there are
        return block
    whole = length * block.n_rows
    sides = Grid(source.start, whole, None, source.rows), Grid(target.start, whole, None, target.rows)
    return Block(1, block.n_rows, length, *sides)


def _consecutive(grid: Grid) -> bool:
    """Whether units follow each other without gaps."""
    return grid.units is None or int(grid.units[-1] - grid.units[0]) == len(grid.units) - 1


def _units(grid: Grid, n_units: int) -> Numbers:
    return np.arange(n_units, dtype=np.int64) if grid.units is None else grid.units


def _breaks(source: Numbers, target: Numbers) -> Numbers:
    """Where runs of units that are adjacent in both arrays begin anew."""
    new = ((source[1:] - source[:-1]) != 1) | ((target[1:] - target[:-1]) != 1)
    return np.flatnonzero(new) + 1


def _some_unit_alone(breaks: Numbers) -> bool:
    """Whether a run of one unit is easily seen: then units cannot be made longer."""
    return len(breaks) > 0 and (breaks[0] == 1 or bool((breaks[1:] - breaks[:-1] == 1).any()))


def _cut(source: Numbers, target: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The same runs in pieces of at most ``LONGEST_RUN`` entries."""
    pieces = -(-lengths // LONGEST_RUN)
    run = np.repeat(np.arange(len(lengths)), pieces)
    done = (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * LONGEST_RUN
    return source[run] + done, target[run] + done, np.minimum(LONGEST_RUN, lengths[run] - done)
