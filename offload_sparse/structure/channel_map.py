"""Atoms, groups and axes: what can be dropped from a network, and what goes with it.

    tensor   conv1.weight [64, 3, 3, 3]     norm1.weight [64]     conv2.weight [128, 64, 3, 3]
    axes       0: 0 1 2 … 63                  0: 0 1 2 … 63         0: 64 65 … 191
               1: none                                              1: 0 1 2 … 63
               2, 3: none                                           2, 3: none

An axis is a vector that names the atom at each position, -1 where a position is always kept; ``None`` stands
for a dimension in which every position is always kept. Flatten (one atom at 49 columns), concatenation
(several groups in a row), depthwise convolutions and coupled residual streams are all just such vectors;
there are no special cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Axis = Tensor | None
"""int64[positions] with the atom at each position (-1: always kept), or None: every position is always kept.

"""


@dataclass(frozen=True)
class Group:
    """The atoms ``start … start + size - 1`` of one width, such as the output channels of one convolution."""

    name: str
    start: int
    size: int

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
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, tuple[Axis, ...]]

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
            if size and (int(axis.min()) < -1 or int(axis.max()) >= self.num_atoms):
                raise ValueError(f"axis {dim} of {name} names an atom outside 0 … {self.num_atoms - 1}")

    @property
    def num_atoms(self) -> int:
        return self.groups[-1].stop if self.groups else 0

    def group_of(self, atom: int) -> Group:
        """The group that holds ``atom``."""
        for group in self.groups:
            if group.start <= atom < group.stop:
                return group
        raise ValueError(f"there is no atom {atom}; the map has {self.num_atoms}")

    def channels_of(self, group: Group) -> Tensor:
        """int64[channels], the atom of each channel of ``group``; -1 where a channel is always kept.

        The channels are those of the layer that the group is named after. Atoms that stand for several
        channels (blocks, groups of a grouped convolution, attention heads) occur several times. A group that
        is not named after a layer lists its atoms.
        """
        for name in (f"{group.name}.weight", group.name):
            for axis in self.axes.get(name, ()):
                if axis is not None and bool(((axis >= group.start) & (axis < group.stop)).any()):
                    return axis
        return torch.arange(group.start, group.stop)

    def full_mask(self) -> Tensor:
        """The mask bool[C] that keeps every atom."""
        return torch.ones(self.num_atoms, dtype=torch.bool)

    def uniform_mask(self, ratio: float, min_width: int = 1) -> Tensor:
        """The mask bool[C] that keeps the first ``round(ratio * size)`` atoms of each group (at least
        ``min_width``).
        """
        mask = torch.zeros(self.num_atoms, dtype=torch.bool)
        for group in self.groups:
            width = min(group.size, max(min_width, round(ratio * group.size)))
            mask[group.start : group.start + width] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form; ``from_json`` is its inverse."""
        return {
            "groups": [[g.name, g.start, g.size] for g in self.groups],
            "tensors": {
                name: {
                    "shape": list(shape),
                    "axes": [None if axis is None else axis.tolist() for axis in self.axes[name]],
                }
                for name, shape in self.shapes.items()
            },
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ChannelMap:
        """Rebuild a map from ``to_json``.

        Raises:
            ValueError: the data does not describe a valid map.
        """
        try:
            groups = tuple(Group(str(name), int(start), int(size)) for name, start, size in data["groups"])
            tensors: Mapping[str, Any] = data["tensors"]
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in tensors.items()}
            axes = {
                name: tuple(None if a is None else torch.tensor(a, dtype=torch.int64) for a in entry["axes"])
                for name, entry in tensors.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a channel map: {error}") from error
        return ChannelMap(groups, shapes, axes)
