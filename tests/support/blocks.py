"""Blocks of any shape by the numbers of their rows and units, plans of them, the entries that they name by
definition, and arrays of any bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.store.copy.blocks import COUNTED, WIDTH, BlockPlan, Numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Grid(NamedTuple):
    """Where the entries of a block lie in a flat array; ``rows`` and ``units`` None: 0, 1, 2, …"""

    start: int
    row_length: int
    rows: Numbers | None = None
    units: Numbers | None = None


class Block(NamedTuple):
    """``n_rows`` x ``n_units`` x ``unit`` entries."""

    n_rows: int
    n_units: int
    unit: int
    source: Grid
    target: Grid


def plan_of(blocks: Sequence[Block], sizes: tuple[int, int] | None = None) -> BlockPlan:
    """For arrays of these sizes, or that end with the last entry of the blocks."""
    most = max([0, *chain.from_iterable(block[:2] for block in blocks)])
    columns, indices = [], [np.arange(most)]

    def place(numbers: Numbers | None) -> int:
        if numbers is None:
            return COUNTED
        indices.append(numbers)
        return sum(map(len, indices[:-1]))

    for n_rows, n_units, unit, *sides in blocks:
        grids = [(g.start, g.row_length, place(g.rows), place(g.units)) for g in sides]
        columns.append([unit, n_units, *grids[0], *grids[1], n_rows])
    table = np.array(columns, np.int64).reshape(-1, WIDTH)
    source, target = (
        max((int(entries_of(block, block[side]).max()) + 1 for block in blocks), default=0) for side in (3, 4)
    )
    return BlockPlan(table, np.concatenate(indices), sizes or (source, target))


@dataclass
class Case:
    """Blocks, the sizes of the two arrays, and the entries that belong together, by definition."""

    plan: BlockPlan
    sizes: tuple[int, int]
    entries: tuple[Tensor, Tensor]


def entries_of(block: Block, grid: Grid) -> Tensor:
    rows = torch.arange(block.n_rows) if grid.rows is None else torch.from_numpy(grid.rows)
    units = torch.arange(block.n_units) if grid.units is None else torch.from_numpy(grid.units)
    within = (units[:, None] * block.unit + torch.arange(block.unit)).flatten()
    return (grid.start + rows[:, None] * grid.row_length + within).flatten()


def numbers(data: st.DataObject, count: int, spread: int) -> tuple[Numbers | None, int]:
    """``count`` sorted numbers below a limit, and the limit; None for 0, 1, 2, …"""
    limit = count + data.draw(st.integers(0, spread))
    if data.draw(st.booleans()):
        return None, limit
    drawn = data.draw(st.sets(st.integers(0, limit - 1), min_size=count, max_size=count))
    return np.array(sorted(drawn), np.int64), limit


@st.composite
def cases(draw: Callable[..., object]) -> Case:
    """Up to four blocks that lie one after the other in both arrays, with gaps."""
    data: st.DataObject = draw(st.data())  # type: ignore[assignment]
    blocks, ends, entries = [], [0, 0], ([], [])
    for _ in range(data.draw(st.integers(0, 4))):
        n_rows, n_units = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
        unit = data.draw(st.sampled_from([1, 1, 2, 3, 4, 8, 9, 70]))
        grids = []
        for side in range(2):
            rows, row_limit = numbers(data, n_rows, 5)
            units, unit_limit = numbers(data, n_units, 5)
            if data.draw(st.booleans()) and units is None:
                unit_limit = n_units
            ends[side] += data.draw(st.integers(0, 3))
            grids.append(Grid(ends[side], unit_limit * unit, rows, units))
            ends[side] += row_limit * unit_limit * unit
        block = Block(n_rows, n_units, unit, *grids)
        blocks.append(block)
        for side in range(2):
            entries[side].append(entries_of(block, grids[side]))
    empty = torch.zeros(0, dtype=torch.int64)
    ends = [end + data.draw(st.integers(0, 3)) for end in ends]
    flat = (torch.cat([empty, *entries[0]]), torch.cat([empty, *entries[1]]))
    return Case(plan_of(blocks), (ends[0], ends[1]), flat)


def random_bits(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype)


def bits(array: Tensor) -> Tensor:
    return array.view(torch.uint8)


def wide_case() -> tuple[BlockPlan, Tensor, Tensor]:
    """Enough entries for several threads: scattered units, whole rows, and one long run."""
    rows, units = np.arange(0, 600, 2), np.arange(0, 900, 3)
    blocks = [
        Block(300, 300, 3, Grid(0, 2700, rows, units), Grid(0, 900)),
        Block(300, 1, 2700, Grid(0, 2700, rows), Grid(270_000, 2700)),
        Block(600, 900, 3, Grid(0, 2700), Grid(1_080_000, 2700)),
    ]
    source = torch.randn(600 * 2700)
    return plan_of(blocks), source, torch.empty(2_700_000)
