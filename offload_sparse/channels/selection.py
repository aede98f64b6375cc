"""A mask resolved against a channel map: kept positions of every tensor, and where they lie in a flat buffer.

    full tensor    [4 rows, 3 columns]             the mask keeps rows 0, 2 and columns 1, 2
    flat, full     r0c0 r0c1 r0c2 r1c0 … r3c2
    flat, narrow   r0c1 r0c2 r2c1 r2c2             the same order, with entries left out

Kept positions are sorted and tensors keep their order, so the narrow flat buffer is a monotone subsequence of
the full one. Whoever owns a contiguous run of the full buffer therefore owns a contiguous run of every narrow
buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.channel_map import ALWAYS, NEVER, Axis, ChannelMap, Group

Kept = Tensor | None
"""int64, the sorted kept positions of one dimension, or None: every position is kept."""


def aligned(dtype: torch.dtype) -> int:
    """Entries that take 16 bytes: matrix units and wide loads want tensors that begin at a multiple of them.
    """
    return max(1, 16 // dtype.itemsize)


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in one flat buffer of ``size`` entries: shapes, in buffer order, and first
    entries by name."""

    shapes: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]
    size: int

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]], step: int = 1) -> Layout:
        """Lay out tensors one after the other, each from the next multiple of ``step`` on."""
        sizes = np.fromiter(map(prod, shapes.values()), np.int64, len(shapes))
        rooms = sizes + -sizes % step
        ends = rooms.cumsum()
        size = int(ends[-1] - rooms[-1] + sizes[-1]) if len(sizes) else 0
        return Layout(dict(shapes), dict(zip(shapes, (ends - rooms).tolist(), strict=True)), size)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The offsets, in buffer order."""
        return np.fromiter(self.offsets.values(), np.int64, len(self.offsets))

    @cached_property
    def _runs(self) -> list[int]:
        """Entries of every tensor, and of the gap behind it."""
        sizes = np.fromiter(map(prod, self.shapes.values()), np.int64, len(self.shapes))
        gaps = np.append(self.starts[1:], self.size)[: len(sizes)] - self.starts - sizes
        runs: list[int] = np.stack([sizes, gaps], 1).flatten().tolist()
        return runs

    @cached_property
    def gaps(self) -> list[tuple[int, int]]:
        """(first entry, entries) of what lies between tensors."""
        pairs = zip(self.offsets.values(), self._runs[::2], self._runs[1::2], strict=True)
        return [(start + size, gap) for start, size, gap in pairs if gap]

    def packed(self, flat: Tensor) -> Tensor:
        """The tensors of ``flat`` one after the other, a copy only where there are gaps."""
        return torch.cat([view.flatten() for view in self.views(flat)]) if self.gaps else flat

    def unpack(self, packed: Tensor, flat: Tensor) -> None:
        """Copy ``packed`` into ``flat``, with the gaps of this layout."""
        views = self.views(flat) if self.gaps else [flat]
        for view, values in zip(views, packed.split([view.numel() for view in views]), strict=True):
            view.copy_(values.view(view.shape))

    def views(self, flat: Tensor) -> list[Tensor]:
        """All tensors, in order, as views of ``flat`` ([at least size])."""
        runs = flat[: self.size].split(self._runs)[::2]
        pairs = zip(runs, self.shapes.values(), strict=True)
        return [run if len(shape) == 1 else run.view(shape) for run, shape in pairs]

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The tensor ``name`` as a view of ``flat`` ([at least size])."""
        shape, offset = self.shapes[name], self.offsets[name]
        return flat[offset : offset + prod(shape)].view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.offsets


class Selection:
    """A mask bool[C], True where an atom is kept, resolved against a channel map. Raises ValueError: the mask
    has another size than the map, or keeps nothing of a group."""

    def __init__(self, channel_map: ChannelMap, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.shape != (channel_map.num_atoms,):
            raise ValueError(
                f"the mask must be bool[{channel_map.num_atoms}], not {mask.dtype}{list(mask.shape)}"
            )
        starts = [group.start for group in channel_map.groups]
        if starts and not (some := np.logical_or.reduceat(mask.numpy(), starts)).all():
            name = channel_map.groups[int(some.argmin())].name
            raise ValueError(f"the mask drops all of group {name!r}, which disconnects the network")
        self.channel_map = channel_map
        self.mask = mask
        alive = self.alive = channel_map.alive(mask)
        self._layouts: dict[tuple[tuple[str, ...], int], Layout] = {}
        distinct = channel_map.distinct_axes
        self._kept_at, counts = distinct.kept(alive)
        sizes = self._sizes = [*counts.tolist(), *distinct.fixed]
        shapes = [tuple([sizes[place] for place in places]) for places in distinct.shapes]
        self.shapes: dict[str, tuple[int, ...]] = dict(
            zip(channel_map.shapes, [shapes[number] for number in distinct.shape_of], strict=True)
        )
        self.additions: dict[str, tuple[Tensor, Tensor]] = {
            name: (alive[a.left][alive[a.out]], alive[a.right][alive[a.out]])
            for name, a in channel_map.additions.items()
        }
        """bool[kept positions of the sum] per operand: where it holds a channel."""
        self.views = {
            name: {view.call: tuple(map(self._fit, view.sizes, view.axes)) for view in calls}
            for name, calls in channel_map.views.items()
        }
        """Per module and call the sizes in the code and what becomes of them; see ``views``."""

    def _fit(self, size: int, axis: Axis) -> tuple[int, int] | None:
        return None if axis is None else (size, int(self.alive[axis].sum()))

    @cached_property
    def kept(self) -> dict[str, tuple[Kept, ...]]:
        """The kept positions of every dimension of every tensor."""
        distinct, memo = self.channel_map.distinct_axes, dict[int, Kept]({id(None): None})
        bounds = zip(distinct.starts[:-1], distinct.starts[1:], strict=True)
        for key, count, (start, stop) in zip(distinct.numbers, self._sizes, bounds, strict=False):
            kept = np.flatnonzero(self._kept_at[start:stop])
            memo[key] = None if count == stop - start else torch.from_numpy(kept)
        axes = self.channel_map.axes
        return {name: tuple([memo[id(axis)] for axis in of_tensor]) for name, of_tensor in axes.items()}

    def layout(self, names: Iterable[str], step: int = 1) -> Layout:
        """The narrow layout of ``names``, in the order given; each from the next multiple of ``step`` on."""
        key = tuple(names), step
        if key not in self._layouts:
            self._layouts[key] = Layout.of({name: self.shapes[name] for name in key[0]}, step)
        return self._layouts[key]

    def take(self, name: str, full: Tensor) -> Tensor:
        """The kept entries of ``full``, a whole tensor of the network, copied by one indexing operation."""
        return full[open_grid(self.kept[name], tuple(full.shape))] if full.dim() else full.clone()


def restrict(channel_map: ChannelMap, mask: Tensor) -> ChannelMap:
    """The map of the narrow network of ``mask``: kept atoms, numbered anew, and what is left of the axes.
    Raises ValueError: the mask keeps nothing of a group."""
    alive = channel_map.alive(mask)
    number = torch.full((channel_map.num_ids + 2,), NEVER)
    number[:-2][alive[:-2]] = torch.arange(int(alive[:-2].sum()))
    number[ALWAYS] = ALWAYS
    groups, start = [], 0
    for group in channel_map.groups:
        width = int(mask[group.start : group.stop].sum())
        groups.append(Group(group.name, start, width, group.shared))
        start += width
    return channel_map.renumbered(groups, number, mask)


def open_grid(kept: tuple[Kept, ...], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Index tensors, one per dimension, that broadcast to the kept block of a tensor of ``shape``."""
    dims = len(shape)
    return tuple(
        (torch.arange(size) if k is None else k).view([-1 if d == e else 1 for e in range(dims)])
        for d, (size, k) in enumerate(zip(shape, kept, strict=True))
    )
