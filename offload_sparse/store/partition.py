"""Which rank owns which rows.

    full flat buffer   | tensor A: rows 0 1 2 3 4 5 | tensor B: rows 0 1 2 | … |
    ranks              |<---- rank 0 ---->|<---- rank 1 ---->|<-- rank 2 --> …

The full flat buffer is cut into world_size runs of nearly equal length, each cut moved to the nearest row
(dimension 0). Because a narrow buffer keeps the order of the full one, the kept entries of a rank are one run
of the narrow buffer too: assembling a subnet needs no reordering.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from offload_sparse.channels.selection import Layout, Selection

Places = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Partition:
    """The rows of a full layout, spread over ``world_size`` ranks."""

    layout: Layout
    world_size: int
    # Every round asks for them again.
    _shards: dict[int, Layout] = field(default_factory=dict)
    _places: dict[tuple[tuple[str, ...], int], Places] = field(default_factory=dict)

    def first_row(self, name: str, rank: int) -> int:
        """The first row of tensor ``name`` that belongs to ``rank`` or a later one, in [0, rows]."""
        rows, length = row_shape(self.layout.shapes[name])
        if not length:
            return rows if rank else 0
        cut = self.layout.size * rank // self.world_size - self.layout.offsets[name]
        return min(rows, max(0, (2 * cut + length) // (2 * length)))

    def rows(self, name: str, rank: int) -> tuple[int, int]:
        """Half-open range of the rows of ``name`` that ``rank`` owns."""
        return self.first_row(name, rank), self.first_row(name, rank + 1)

    def shard(self, rank: int) -> Layout:
        """Layout of the rows that ``rank`` owns; tensors of which it owns nothing have zero rows."""
        if rank not in self._shards:
            shapes = {}
            for name, shape in self.layout.shapes.items():
                low, high = self.rows(name, rank)
                shapes[name] = (high - low, *shape[1:])
            self._shards[rank] = Layout.of(shapes)
        return self._shards[rank]

    def places(self, names: tuple[str, ...], rank: int) -> Places:
        """int64 of these tensors: where each begins in the shard of ``rank``, and [tensors, 2], the rows that
        it owns."""
        if (names, rank) not in self._places:
            offsets, rows = self.shard(rank).offsets, [self.rows(name, rank) for name in names]
            starts = np.array([offsets[name] for name in names], np.int64)
            self._places[names, rank] = starts, np.array(rows, np.int64).reshape(-1, 2)
        return self._places[names, rank]

    def segment(self, selection: Selection, narrow: Layout, rank: int) -> tuple[int, int]:
        """Half-open range of the narrow flat buffer whose entries ``rank`` owns."""
        return self._cut(selection, narrow, rank), self._cut(selection, narrow, rank + 1)

    def _cut(self, selection: Selection, narrow: Layout, rank: int) -> int:
        for name in self.layout.shapes:
            first, (rows, _) = self.first_row(name, rank), row_shape(self.layout.shapes[name])
            if first < rows:
                kept = selection.kept[name][0] if selection.kept[name] else None
                before = first if kept is None else int((kept < first).sum())
                return narrow.offsets[name] + before * row_shape(narrow.shapes[name])[1]
        return narrow.size


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, entries per row) of a tensor; a scalar is one row of one entry."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
