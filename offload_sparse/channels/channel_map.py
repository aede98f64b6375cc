"""Atoms, groups and axes: what can be dropped from a network, and what goes with it.

An *atom* is the smallest thing kept or dropped as one: a channel with everything tied to it (scale and shift
of its norm, depthwise filter, the columns that read it), or a run of channels, a group of a grouped
convolution, an attention head. A *group* holds the atoms of one width.

    tensor   conv1.weight [64, 3, 3, 3]     norm1.weight [64]     conv2.weight [128, 64, 3, 3]
    axes       0: 0 1 2 … 63                  0: 0 1 2 … 63         0: 64 65 … 191
               1: none                                              1: 0 1 2 … 63
               2, 3: none                                           2, 3: none

An axis is a vector that names the atom at each position, -1 where a position is always kept; ``None`` stands
for a dimension in which every position is always kept. Flatten (one atom at 49 columns), concatenation
(several groups in a row), depthwise convolutions and coupled residual streams are all just such vectors;
there are no special cases.

Where every filter has a mask of its own, a position of a residual stream is alive if any of the filters
that were added there is. Such a position names a *union* of atoms: an id from ``num_atoms`` on, alive if a
member is.

    atoms      0 … 63 stem     64 … 127 branch        unions     128 … 191: {0, 64}, {1, 65}, … {63, 127}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALWAYS, NEVER = -1, -2
"""Entries of an axis that depend on no atom: always kept, or (in an addition only) never there."""

Axis = Tensor | None
"""int64[positions], the atom at each position (-1: always kept), or None: every position is always kept."""


def _as_list(axis: Axis) -> list[int] | None:
    return None if axis is None else axis.tolist()


class DistinctAxes:
    """The axes of a map, one behind the other, each once however many tensors have it: what depends on a mask
    is worked out for all of them at a time.

    Attributes:
        numbers: of every axis, by its identity.
        atoms: int64[positions], all axes.
        starts: int64[axes + 1], where each begins in ``atoms``; at the end their length.
        fixed: sizes of dimensions without an axis.
        shapes: those of tensors, each once: of every dimension its place among all axes and ``fixed``.
        shape_of: the number of the shape of every tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[Axis, ...]]) -> None:
        found = {id(axis): axis.numpy() for of in axes.values() for axis in of if axis is not None}
        self.numbers = {key: number for number, key in enumerate(found)}
        self.atoms = np.concatenate([np.zeros(0, np.int64), *found.values()])
        self.starts = np.cumsum([0, *map(len, found.values())])
        fixed, distinct = dict[int, int](), dict[tuple[int, ...], int]()
        self.shape_of = []
        for name, shape in shapes.items():
            places = tuple(
                len(found) + fixed.setdefault(size, len(fixed)) if axis is None else self.numbers[id(axis)]
                for size, axis in zip(shape, axes[name], strict=True)
            )
            self.shape_of.append(distinct.setdefault(places, len(distinct)))
        self.fixed, self.shapes = list(fixed), list(distinct)

    def kept(self, alive: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """bool[positions], which are alive by ``ChannelMap.alive``; int64[axes], how many of each."""
        at = alive.numpy()[self.atoms]
        return at, np.diff(np.append(0, at.cumsum())[self.starts])


@dataclass(frozen=True, eq=False)
class Addition:
    """A residual addition whose operands hold different channels: int64[positions], the atom or union at each
    position of both operands (``NEVER`` where one has none) and of the sum, which is alive wherever an
    operand is."""

    left: Tensor
    right: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class View:
    """A call such as ``view`` or ``split`` whose sizes are written in the code of a module.

    Attributes:
        call: its number among such calls of one ``forward``.
        sizes: the sizes in the code that stand for the axes; 0 stands for any.
        axes: per size the atoms of its positions; None where a size is right as it is."""

    call: int
    sizes: tuple[int, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Group:
    """The atoms ``start … start + size - 1`` of one width, such as the output channels of one convolution.

    ``shared``: query heads whose key and value are those of all others. A dropped one is gone when the
    columns that read it are zero; without queries it would still average the values.
    """

    name: str
    start: int
    size: int
    shared: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Which positions of which tensors belong to which atom.

    Attributes:
        groups: the groups, in order; together they cover the atoms 0 … num_atoms - 1 without gaps.
        shapes: full shape of every parameter and buffer that can be sliced, by qualified name.
        axes: per tensor one ``Axis`` per dimension. Tensors that no atom touches have ``None`` everywhere.
        unions: int64[2, members], pairs (union, atom), sorted by union; union u has the id ``num_atoms + u``.
        additions: by the name of the ``StreamAdd`` that computes it; only those with operands that differ.
        views: by the name of the module whose ``forward`` makes the calls."""

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, tuple[Axis, ...]]
    unions: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.int64))
    additions: Mapping[str, Addition] = field(default_factory=dict)
    views: Mapping[str, tuple[View, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = 0
        for group in self.groups:
            if group.start != expected or group.size < 1:
                raise ValueError(
                    f"group {group.name!r} must start at atom {expected} and hold at least one atom"
                )
            expected = group.stop
        if set(self.shapes) != set(self.axes):
            raise ValueError(
                f"shapes and axes name different tensors: {sorted(set(self.shapes) ^ set(self.axes))[:5]}"
            )
        for name, shape in self.shapes.items():
            self._check_axes(name, shape)

    def _check_axes(self, name: str, shape: tuple[int, ...]) -> None:
        axes = self.axes[name]
        if len(axes) != len(shape):
            raise ValueError(f"{name} has {len(shape)} dimensions, but {len(axes)} axes were given")
        for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            if axis is None:
                continue
            if axis.dtype != torch.int64 or axis.shape != (size,):
                raise ValueError(
                    f"axis {dim} of {name} must be int64[{size}], not {axis.dtype}{list(axis.shape)}"
                )
            if size and (int(axis.min()) < ALWAYS or int(axis.max()) >= self.num_ids):
                raise ValueError(f"axis {dim} of {name} names an atom outside 0 … {self.num_ids - 1}")

    @property
    def num_atoms(self) -> int:
        return self.groups[-1].stop if self.groups else 0

    @property
    def num_ids(self) -> int:
        """Atoms and unions."""
        return self.num_atoms + (int(self.unions[0, -1]) + 1 if self.unions.numel() else 0)

    def alive(self, mask: Tensor) -> Tensor:
        """bool[num_ids + 2]: what ``mask`` (bool[num_atoms]) keeps, to be indexed by the entries of an axis.

        The last two entries are those of ``NEVER`` and ``ALWAYS``."""
        known, (unions, members) = mask.numpy(), self.unions.numpy()
        alive = np.zeros(self.num_ids + 2, bool)
        alive[: self.num_atoms], alive[ALWAYS] = known, True
        alive[self.num_atoms + unions[known[members]]] = True
        return torch.from_numpy(alive)

    def alive_probability(self, s: Tensor) -> Tensor:
        """float64[num_ids]: how probable it is that an atom or union is alive, by the probabilities ``s`` of
        independent atoms (float64[C]); differentiable in them."""
        gone = torch.zeros(self.num_ids - self.num_atoms, dtype=s.dtype)
        gone = gone.index_add(0, self.unions[0], torch.log1p(-s.clamp(max=1 - 1e-12))[self.unions[1]])
        return torch.cat([s, -torch.expm1(gone)])

    def channels_of(self, group: Group) -> Tensor:
        """int64[channels], the atom of each channel of ``group``; -1 where a channel is always kept.

        The channels are those of the layer that the group is named after. Atoms that stand for several
        channels (blocks, groups of a grouped convolution, attention heads) occur several times. A group that
        is not named after a layer lists its atoms."""
        for name in (f"{group.name}.weight", group.name):
            for axis in self.axes.get(name, ()):
                if axis is not None and bool(((axis >= group.start) & (axis < group.stop)).any()):
                    return axis
        return torch.arange(group.start, group.stop)

    @cached_property
    def distinct_axes(self) -> DistinctAxes:
        return DistinctAxes(self.shapes, self.axes)

    def full_mask(self) -> Tensor:
        """The mask bool[C] that keeps every atom."""
        return torch.ones(self.num_atoms, dtype=torch.bool)

    def uniform_mask(self, ratio: float, min_width: int = 1) -> Tensor:
        """The mask bool[C] that keeps the first ``round(ratio * size)`` atoms of each group (at least
        ``min_width``)."""
        mask = torch.zeros(self.num_atoms, dtype=torch.bool)
        for group in self.groups:
            width = min(group.size, max(min_width, round(ratio * group.size)))
            mask[group.start : group.start + width] = True
        return mask

    def renumbered(self, groups: Iterable[Group], number: Tensor, mask: Tensor) -> ChannelMap:
        """What ``mask`` (bool[C]) leaves of the map, with other ids.

        Args:
            groups: those of the new map.
            number: int64[num_ids + 2], what each id becomes, unions behind the atoms of ``groups``; the last
                two entries are those of ``NEVER`` and ``ALWAYS``."""
        groups, alive = tuple(groups), self.alive(mask)
        memo: dict[int, Axis] = {id(None): None}  # axes that were one tensor stay one

        def left(axis: Axis) -> Axis:
            if axis is not None and id(axis) not in memo:
                memo[id(axis)] = number[axis[alive[axis]]]
            return memo[id(axis)]

        axes = {name: tuple(map(left, of_tensor)) for name, of_tensor in self.axes.items()}
        shapes = {
            name: tuple(n if a is None else len(a) for n, a in zip(shape, axes[name], strict=True))
            for name, shape in self.shapes.items()
        }
        unions, members = self.unions[:, mask[self.unions[1]]]
        unions = number[self.num_atoms + unions] - sum(group.size for group in groups)
        pairs = torch.stack([unions, number[members]]).unique(dim=1)
        additions = {
            name: Addition(*(number[ids[alive[a.out]]] for ids in (a.left, a.right, a.out)))
            for name, a in self.additions.items()
        }
        views = {
            name: tuple(View(v.call, v.sizes, tuple(map(left, v.axes))) for v in calls)
            for name, calls in self.views.items()
        }
        return ChannelMap(groups, shapes, axes, pairs, additions, views)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds: equal for equal maps."""
        return {
            "groups": [[g.name, g.start, g.size, *([True] if g.shared else [])] for g in self.groups],
            "unions": self.unions.tolist(),
            "additions": {
                name: [a.left.tolist(), a.right.tolist(), a.out.tolist()]
                for name, a in self.additions.items()
            },
            "views": {
                name: [[v.call, list(v.sizes), [_as_list(a) for a in v.axes]] for v in calls]
                for name, calls in self.views.items()
            },
            "tensors": {
                name: {
                    "shape": list(shape),
                    "axes": [_as_list(axis) for axis in self.axes[name]],
                }
                for name, shape in self.shapes.items()
            },
        }
