"""Blocks copied by torch's own indexing, on any device: what is done where no kernel works.

The numbers of the entries of a plan that fits in one chunk are worked out once and kept with it. Those of a
larger one are worked out chunk by chunk on the device, from row and unit numbers that are there already.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import Block, BlockPlan, Grid
from offload_sparse.store.copy.tables import to_device, used_now

CHUNK = 1 << 20
"""Entries copied per call, or one row: 16 MiB of numbers."""


@torch.no_grad()
def copy_by_torch(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy every block from ``source`` to ``target``, flat arrays on one device; ``reverse`` copies back."""
    giver, taker = (target, source) if reverse else (source, target)
    numbers = numbers_of(plan, source.device)
    used_now(numbers)
    small = plan.entries <= CHUNK
    for here, there in [(numbers[0], numbers[1])] if small else _chunks(plan, numbers):
        if reverse:
            here, there = there, here
        taker.index_copy_(0, there, giver.index_select(0, here))


def numbers_of(plan: BlockPlan, device: torch.device) -> Tensor:
    """What is kept with a plan: all numbers, int64[2, entries], or its indices."""
    return plan.derived(_whole if plan.entries <= CHUNK else _indices, device)


def _whole(plan: BlockPlan, device: torch.device) -> Tensor:
    """Worked out on the host and sent in one piece."""
    pairs = _chunks(plan, torch.from_numpy(plan.indices))
    return to_device(torch.stack([torch.cat(side) for side in zip(*pairs, strict=True)]), device)


def _indices(plan: BlockPlan, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(plan.indices), device)


def _chunks(plan: BlockPlan, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """int64: the numbers of some entries in the source and in the target, until all have been."""
    for block in plan.blocks:
        step = max(1, CHUNK // (block.n_units * block.unit))
        for first in range(0, block.n_rows, step):
            rows = slice(first, min(block.n_rows, first + step))
            yield _numbers(block, block.source, rows, indices), _numbers(block, block.target, rows, indices)


def _numbers(block: Block, grid: Grid, part: slice, indices: Tensor) -> Tensor:
    """int64: the numbers of the entries of part of the rows of a block."""
    rows = indices[grid.rows :][part]
    units = indices[grid.units :][: block.n_units]
    within = units[:, None] * block.unit + torch.arange(block.unit, device=indices.device)
    return (grid.start + rows[:, None] * grid.row_length + within.flatten()).flatten()
