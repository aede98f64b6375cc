"""Blocks copied by torch's own indexing, on any device.

A block is a flat ``index_select`` or ``index_copy_`` over units, in chunks that bound the index memory; where
one of the arrays holds the block as one run, no intermediate tensor is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import Block, Grid

CHUNK = 1 << 18
"""Units moved per call: 2 MiB of index."""


@torch.no_grad()
def copy_by_torch(blocks: Sequence[Block], source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy every block from ``source`` to ``target``, flat arrays on one device; ``reverse`` copies back."""
    for block in blocks:
        there, here = (block.target, block.source) if reverse else (block.source, block.target)
        arrays = (target, source) if reverse else (source, target)
        unit = gcd(block.unit, there.row_length, here.row_length)
        step = max(1, CHUNK // (block.n_units * (block.unit // unit)))
        for first in range(0, block.n_rows, step):
            last = min(block.n_rows, first + step)
            _copy_rows(block, there, here, arrays, unit, first, last)


def _copy_rows(
    block: Block, there: Grid, here: Grid, arrays: tuple[Tensor, Tensor], unit: int, first: int, last: int
) -> None:
    source, target = arrays
    length = block.n_units * block.unit
    size = (last - first) * length
    if block.is_run(here):
        out = target[here.start + first * length :][:size].view(-1, unit)
        units = _units(block, there, source, unit)
        torch.index_select(units, 0, _index(block, there, source, unit, first, last), out=out)
        return
    if block.is_run(there):
        values = source[there.start + first * length :][:size].view(-1, unit)
    else:
        index = _index(block, there, source, unit, first, last)
        values = _units(block, there, source, unit).index_select(0, index)
    _units(block, here, target, unit).index_copy_(0, _index(block, here, target, unit, first, last), values)


def _units(block: Block, grid: Grid, array: Tensor, unit: int) -> Tensor:
    """The part of ``array`` that holds the block, as [units, unit]."""
    return array[grid.start : block.end(grid)].view(-1, unit)


def _index(block: Block, grid: Grid, array: Tensor, unit: int, first: int, last: int) -> Tensor:
    """int64[units of rows first … last - 1], their numbers in ``_units``."""
    device = array.device
    rows = torch.arange(first, last) if grid.rows is None else grid.rows[first:last]
    units = torch.arange(block.n_units) if grid.units is None else grid.units
    split = block.unit // unit
    if split > 1:
        units = (units[:, None] * split + torch.arange(split)).flatten()
    rows, units = rows.to(device), units.to(device)
    return (rows[:, None] * (grid.row_length // unit) + units).flatten()
