"""The copy kernel for CUDA devices: one program per piece of a block, in either direction.

Both arrays may be device memory, or one of them page-locked host memory that the device reads or writes
directly (zero-copy), so that only kept entries cross the bus and nothing is staged. Imports Triton. Run under
Triton's interpreter only so far, not yet on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_sparse.store.copy.blocks import Block, Grid

PROGRAM = 1 << 13
"""Entries per program."""

STEP = 1 << 10
"""Entries that a program copies at a time."""

_SOURCE, _TARGET = 2, 6


class DeviceTables:
    """Blocks as the kernel reads them, on one device.

    Attributes:
        programs: int64[programs, 3], block and its range of entries.
        blocks: int64[blocks, 10]: unit, units per row, and for each array start, row length, positions of
            row and unit numbers in ``indices``.
        indices: int64[*].
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        size = max(max(block.n_rows, block.n_units) for block in blocks)
        chunks = [torch.arange(size)]  # serves rows and units that are 0, 1, 2, …
        at = {id(None): 0}

        def place(numbers: Tensor | None) -> int:
            nonlocal size
            if id(numbers) not in at:
                assert numbers is not None
                at[id(numbers)] = size
                chunks.append(numbers)
                size += numbers.numel()
            return at[id(numbers)]

        def columns(grid: Grid) -> tuple[int, ...]:
            return grid.start, grid.row_length, place(grid.rows), place(grid.units)

        table = [(b.unit, b.n_units, *columns(b.source), *columns(b.target)) for b in blocks]
        programs = []
        for number, block in enumerate(blocks):
            first = np.arange(0, block.entries, PROGRAM, dtype=np.int64)
            last = np.minimum(first + PROGRAM, block.entries)
            programs.append(np.stack([np.full_like(first, number), first, last], axis=1))
        self.programs = torch.from_numpy(np.concatenate(programs)).to(device)
        self.blocks = torch.tensor(table, dtype=torch.int64).to(device)
        self.indices = torch.cat(chunks).to(device)


@triton.jit
def _locate(blocks, indices, base, row, unit_number, rest, unit, used):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Entries of an array: start + row * row length + unit number * unit + rest."""
    start = tl.load(blocks + base)
    row_length = tl.load(blocks + base + 1)
    rows = indices + tl.load(blocks + base + 2)
    units = indices + tl.load(blocks + base + 3)
    row = tl.load(rows + row, mask=used, other=0)
    unit_number = tl.load(units + unit_number, mask=used, other=0)
    return start + row * row_length + unit_number * unit + rest


@triton.jit
def _copy_programs(  # type: ignore[no-untyped-def]  # noqa: ANN202
    programs,  # noqa: ANN001
    blocks,  # noqa: ANN001
    indices,  # noqa: ANN001
    source,  # noqa: ANN001
    target,  # noqa: ANN001
    from_grid: tl.constexpr,
    to_grid: tl.constexpr,
    step: tl.constexpr,
):
    program = tl.program_id(0)
    base = tl.load(programs + program * 3) * 10
    first = tl.load(programs + program * 3 + 1)
    last = tl.load(programs + program * 3 + 2)
    unit = tl.load(blocks + base)
    n_units = tl.load(blocks + base + 1)
    for offset in range(first, last, step):
        entry = offset + tl.arange(0, step)
        used = entry < last
        number = entry // unit
        row = number // n_units
        rest = entry - number * unit
        unit_number = number - row * n_units
        here = _locate(blocks, indices, base + from_grid, row, unit_number, rest, unit, used)
        there = _locate(blocks, indices, base + to_grid, row, unit_number, rest, unit, used)
        tl.store(target + there, tl.load(source + here, mask=used), mask=used)


def launch(tables: DeviceTables, source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy all blocks from ``source`` to ``target`` (back if ``reverse``) on the current stream.

    Args:
        tables: the blocks.
        source, target: flat arrays of one dtype, each on the device or in page-locked host memory.
        reverse: copy from ``target`` to ``source``.
    """
    words: Any = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    arrays, grids = [source.view(words), target.view(words)], [_SOURCE, _TARGET]
    if reverse:
        arrays.reverse()
        grids.reverse()
    grid = (tables.programs.shape[0],)
    _copy_programs[grid](tables.programs, tables.blocks, tables.indices, *arrays, *grids, STEP)
