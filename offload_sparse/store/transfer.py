"""Gather and scatter between a rank's rows and its run of a narrow flat buffer.

Every tensor is one block move: kept rows times kept units within a row, where a unit is the longest run that
is always contiguous (the 3x3 window of a convolution, a whole row when all columns are kept). A move is a
single flat ``index_select`` or ``index_copy_`` over units, in chunks that bound the index memory; no
intermediate tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from offload_sparse.store.partition import Partition, kept_before, row_shape
from offload_sparse.structure.selection import Kept, Layout, Selection

CHUNK = 1 << 18
"""Units moved per call: 2 MiB of index."""


@dataclass(frozen=True)
class BlockMove:
    """The kept entries of one tensor that one rank owns.

    Attributes:
        source: first entry of the tensor's rows in the rank's shard.
        target: first entry in the narrow flat buffer.
        rows: int64, kept rows relative to the first own one.
        row_units: units per full row.
        pattern: int64, kept units within a row.
        unit: contiguous entries per unit.
        own_rows: rows that the rank owns.
    """

    source: int
    target: int
    rows: Tensor
    row_units: int
    pattern: Tensor
    unit: int
    own_rows: int

    def full_view(self, shard: Tensor) -> Tensor:
        """The rank's rows of the tensor as [units, unit], a view of its shard."""
        length = self.own_rows * self.row_units
        return shard[self.source : self.source + length * self.unit].view(length, self.unit)

    def chunks(self) -> Iterator[tuple[Tensor, int, int]]:
        """(int64 unit indices, first narrow entry, number of narrow entries), a bounded number of units at a
        time.
        """
        step = max(1, CHUNK // max(1, self.pattern.numel()))
        target = self.target
        for rows in self.rows.split(step):
            index = (rows[:, None] * self.row_units + self.pattern).flatten()
            size = index.numel() * self.unit
            yield index, target, size
            target += size


def block_moves(partition: Partition, selection: Selection, narrow: Layout, rank: int) -> list[BlockMove]:
    """The moves of ``rank`` for one selection; they serve weights and every optimizer slot alike."""
    shard = partition.shard(rank)
    moves = []
    for name, shape in partition.layout.shapes.items():
        low, high = partition.rows(name, rank)
        kept = selection.kept[name]
        rows = _own_rows(kept[0] if kept else None, low, high)
        if not rows.numel():
            continue
        before = kept_before(kept[0] if kept else None, low) * row_shape(narrow.shapes[name])[1]
        pattern, unit = _row_pattern(kept[1:], shape[1:])
        row_units = row_shape(shape)[1] // unit
        moves.append(
            BlockMove(
                shard.offsets[name], narrow.offsets[name] + before, rows, row_units, pattern, unit, high - low
            )
        )
    return moves


def _own_rows(kept: Kept, low: int, high: int) -> Tensor:
    if kept is None:
        return torch.arange(high - low)
    return kept[(kept >= low) & (kept < high)] - low


def _row_pattern(kept: tuple[Kept, ...], shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Kept units within a row of ``shape``, and the entries per unit."""
    indexed = [dim for dim, k in enumerate(kept) if k is not None]
    last = indexed[-1] if indexed else -1
    pattern = torch.zeros(1, dtype=torch.int64)
    for dim in range(last + 1):
        positions = kept[dim]
        steps = torch.arange(shape[dim]) if positions is None else positions
        pattern = (pattern[:, None] * shape[dim] + steps).flatten()
    return pattern, max(1, prod(shape[last + 1 :]))


@torch.no_grad()
def gather(shard: Tensor, moves: list[BlockMove], out: Tensor, out_offset: int = 0) -> None:
    """Copy the kept entries of ``shard`` to ``out``, whose entry 0 is narrow entry ``out_offset``."""
    for move in moves:
        full = move.full_view(shard)
        for index, target, size in move.chunks():
            start = target - out_offset
            torch.index_select(full, 0, index, out=out[start : start + size].view(-1, move.unit))


@torch.no_grad()
def scatter(shard: Tensor, moves: list[BlockMove], values: Tensor, values_offset: int = 0) -> None:
    """Write narrow ``values`` (entry 0 is narrow entry ``values_offset``) back into a rank's ``shard``;
    others stay.
    """
    for move in moves:
        full = move.full_view(shard)
        for index, target, size in move.chunks():
            start = target - values_offset
            full.index_copy_(0, index, values[start : start + size].view(-1, move.unit))
