"""Blocks as kernels read them: tables of numbers.

The native kernel's, adjacent units merged, work cut into items:

    items     block, rows [from, to), units [from, to)      about ITEM entries each: what threads share out
    blocks    unit, position of run lengths, and for each array: start, row length, positions of rows and of
              units, whether to look ahead in this array, and whether it is the other one and its units
              leave no gaps; positions are those in
    indices   those of the plan, of which row numbers are read; behind them offsets of units within a row (in
              entries), and run lengths

A device's, in its own memory, so that a copy sends nothing there:

    programs  block and its range of entries
    blocks    unit, units per row, and for each array: start, row length, positions of rows and of units in
    indices   those of the plan: row and unit numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import COUNTED, N_ROWS, Block, BlockPlan, Grid, Numbers

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

    def __init__(self, plan: BlockPlan) -> None:
        self._plan = plan
        self._chunks, self._size = [plan.indices], len(plan.indices)
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._items: list[tuple[int, ...]] = []
        rows = [self._block(number, _without_full_rows(block)) for number, block in enumerate(plan.blocks)]
        self.blocks = np.array(rows, np.int64).reshape(-1, BLOCK_WIDTH)
        self.items = np.array(self._items, np.int64).reshape(-1, ITEM_WIDTH)
        self.indices = np.concatenate(self._chunks)
        self.addresses = tuple(int(table.ctypes.data) for table in (self.items, self.blocks, self.indices))
        del self._plan, self._chunks, self._known, self._items

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
        source = self._grid(block, block.source, source_at, wider)
        target = self._grid(block, block.target, target_at, not wider)
        return unit, lengths_at, *source, *target

    def _units_of(self, block: Block) -> tuple[int, ...]:
        """Unit, position of run lengths (-1: none), units or runs per row, mean entries of one, and positions
        of their offsets in source and target; tensors that keep the same units share them."""
        key = block.n_units, block.unit, block.source.units, block.target.units
        if key not in self._known:
            self._known[key] = self._add_units(block)
        return self._known[key]

    def _add_units(self, block: Block) -> tuple[int, ...]:
        source, target = (
            self._plan.numbers(grid.units, block.n_units) for grid in (block.source, block.target)
        )
        bounds = _bounds(source, target)
        lengths = bounds[1:] - bounds[:-1]
        step = int(np.gcd.reduce(lengths))  # runs that are all multiples of some units make longer units
        source, target = (side[::step] * block.unit for side in (source, target))
        unit, lengths = block.unit * step, lengths // step
        if len(source) * unit < RUN_FROM * len(lengths):
            return unit, -1, len(source), unit, self._add(source), self._add(target)
        first = bounds[:-1] // step
        source, target, lengths = _cut(source[first], target[first], lengths * unit)
        lengths_at, mean = self._add(lengths), int(lengths.mean())
        return unit, lengths_at, len(lengths), mean, self._add(source), self._add(target)

    def _grid(self, block: Block, grid: Grid, units_at: int, ahead: bool) -> tuple[int, ...]:
        first, last = self._plan.indices[grid.units], self._plan.indices[grid.units + block.n_units - 1]
        dense = not ahead and last - first == block.n_units - 1  # of the wider array nobody asks
        return grid.start, grid.row_length, grid.rows, units_at, int(ahead), int(dense)

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
    def of(plans: Sequence[BlockPlan], device: torch.device, program: int) -> list[DeviceTables]:
        """Those of several plans of at least one block each, sent in one piece; plans with the same indices
        share them.

        Args:
            plans: the blocks.
            device: where the tables shall be.
            program: entries per program."""
        indices = {id(plan.indices): plan.indices for plan in plans}
        programs = [_programs(plan, program) for plan in plans]
        parts = [*indices.values(), *programs, *(plan.columns[:, :N_ROWS] for plan in plans)]
        together = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        sent = to_device(together, device).split([part.size for part in parts])
        there, sent = dict(zip(indices, sent, strict=False)), sent[len(indices) :]
        return [
            DeviceTables(programs.view(-1, 3), blocks.view(-1, N_ROWS), there[id(plan.indices)])
            for plan, programs, blocks in zip(plans, sent, sent[len(plans) :], strict=False)
        ]


def _programs(plan: BlockPlan, size: int) -> Numbers:
    """int64[programs, 3]: the blocks of a plan in ranges of at most ``size`` entries."""
    entries = plan.counts
    counts = -(-entries // size)
    block = np.arange(len(counts)).repeat(counts)
    first = (np.arange(len(block)) - (counts.cumsum() - counts)[block]) * size
    return np.stack([block, first, np.minimum(first + size, entries[block])], 1)


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


def _without_full_rows(block: Block) -> Block:
    """Where both arrays hold whole rows, every row is a unit and the block a single row."""
    length, source, target = block.n_units * block.unit, block.source, block.target
    if source.row_length != length or target.row_length != length:  # so many sorted units are all there are
        return block
    whole = length * block.n_rows
    sides = Grid(source.start, whole, COUNTED, source.rows), Grid(target.start, whole, COUNTED, target.rows)
    return Block(length, block.n_rows, *sides, 1)


def _bounds(source: Numbers, target: Numbers) -> Numbers:
    """Where runs of units that are adjacent in both arrays begin, and the end of the last."""
    new = np.ones(len(source) + 1, bool)
    new[1:-1] = ((source[1:] - source[:-1]) != 1) | ((target[1:] - target[:-1]) != 1)
    return np.flatnonzero(new)


def _cut(source: Numbers, target: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The same runs in pieces of at most ``LONGEST_RUN`` entries."""
    pieces = -(-lengths // LONGEST_RUN)
    run = np.repeat(np.arange(len(lengths)), pieces)
    done = (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * LONGEST_RUN
    return source[run] + done, target[run] + done, np.minimum(LONGEST_RUN, lengths[run] - done)
