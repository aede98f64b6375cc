"""Blocks copied by torch's own indexing, on any device: what is done where no kernel works.

The numbers of the entries of a plan that fits in one chunk are worked out once and kept with it. Those of a
larger one are worked out chunk by chunk on the device, from row and unit numbers that are there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import Block, BlockPlan, Grid
from offload_sparse.store.copy.tables import to_device, used_now

CHUNK = 1 << 20
"""Entries copied per call, or one row: 16 MiB of numbers."""

_Numbers = tuple[Tensor, Tensor]
"""int64: the numbers of some entries in the source and in the target."""


@torch.no_grad()
def copy_by_torch(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy every block from ``source`` to ``target``, flat arrays on one device; ``reverse`` copies back."""
    giver, taker = (target, source) if reverse else (source, target)
    for numbers in _chunks(plan, source.device):
        here, there = reversed(numbers) if reverse else numbers
        taker.index_copy_(0, there, giver.index_select(0, here))


def numbers_of(plan: BlockPlan, device: torch.device) -> _Numbers | dict[int, Tensor]:
    """What is kept with a plan: all numbers, or those of rows and units, by the identity of the blocks'."""
    return plan.derived(_whole, device) if plan.entries <= CHUNK else plan.derived(_sent, device)


def _chunks(plan: BlockPlan, device: torch.device) -> Iterator[_Numbers]:
    if not plan.entries:
        return
    there = numbers_of(plan, device)
    for numbers in there.values() if isinstance(there, dict) else there[:1]:
        used_now(numbers)
    if isinstance(there, tuple):
        yield there
        return
    for block in plan.blocks:
        step = max(1, CHUNK // (block.n_units * block.unit))
        for first in range(0, block.n_rows, step):
            rows = torch.arange(first, min(block.n_rows, first + step), device=device)
            yield _numbers(block, block.source, rows, there), _numbers(block, block.target, rows, there)


def _whole(blocks: Sequence[Block], device: torch.device) -> _Numbers:
    """All at once, worked out on the host and sent in one piece."""
    there = _sent(blocks, torch.device("cpu"))
    source = [_numbers(block, block.source, torch.arange(block.n_rows), there) for block in blocks]
    target = [_numbers(block, block.target, torch.arange(block.n_rows), there) for block in blocks]
    pair = torch.stack([torch.cat(source), torch.cat(target)])
    here, to = to_device(pair, device)
    return here, to


def _sent(blocks: Sequence[Block], device: torch.device) -> dict[int, Tensor]:
    """Row and unit numbers on the device, by the identity of those of the blocks."""
    numbers = [n for b in blocks for g in (b.source, b.target) for n in (g.rows, g.units) if n is not None]
    distinct = {id(n): n for n in numbers}
    together = np.concatenate([np.zeros(0, np.int64), *distinct.values()])
    sent = to_device(torch.from_numpy(together), device)
    return dict(zip(distinct, sent.split([len(n) for n in distinct.values()]), strict=True))


def _numbers(block: Block, grid: Grid, rows: Tensor, there: dict[int, Tensor]) -> Tensor:
    """int64: the numbers of the entries of some rows of a block, which are numbered 0 … n_rows - 1."""
    if grid.rows is not None:
        rows = there[id(grid.rows)][rows]
    units = torch.arange(block.n_units, device=rows.device) if grid.units is None else there[id(grid.units)]
    within = units[:, None] * block.unit + torch.arange(block.unit, device=rows.device)
    return (grid.start + rows[:, None] * grid.row_length + within.flatten()).flatten()
