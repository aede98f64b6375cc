"""Random channel maps and small networks with hand-made maps, for tests of every room."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, starmap
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import Axis, ChannelMap, Group
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.specs import MapBuilder


@st.composite
def channel_maps(draw: st.DrawFn) -> ChannelMap:
    """Maps with every kind of axis: plain, concatenated, flattened, of unions, partly always kept, absent."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = tuple(Group(f"g{i}", a, n) for i, (a, n) in enumerate(zip(starts, sizes, strict=True)))
    atoms = st.sets(st.integers(0, sum(sizes) - 1), min_size=1, max_size=3)
    members = draw(st.lists(atoms, max_size=4))
    pairs = [(number, atom) for number, union in enumerate(members) for atom in sorted(union)]
    unions = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    group_axis = st.sampled_from(groups).map(lambda g: torch.arange(g.start, g.stop))
    kinds = st.one_of(
        st.just(None),
        group_axis,
        st.tuples(group_axis, group_axis).map(torch.cat),
        group_axis.map(lambda a: torch.cat([a, sum(sizes) + torch.arange(len(members))])),
        st.tuples(group_axis, st.integers(2, 4)).map(lambda a: a[0].repeat_interleave(a[1])),
        group_axis.map(lambda a: torch.cat([a, torch.full((2,), -1)])),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    for i in range(draw(st.integers(1, 5))):
        dims: list[Axis] = draw(st.lists(kinds, min_size=0, max_size=4))
        axes[f"t{i}"] = tuple(dims)
        shapes[f"t{i}"] = tuple(draw(st.integers(1, 4)) if a is None else a.numel() for a in dims)
    return ChannelMap(groups, shapes, axes, unions)


@st.composite
def masks(draw: st.DrawFn, channel_map: ChannelMap) -> Tensor:
    """Masks that keep at least one atom of every group."""
    mask = torch.zeros(channel_map.num_atoms, dtype=torch.bool)
    for group in channel_map.groups:
        kept = draw(st.sets(st.integers(group.start, group.stop - 1), min_size=1))
        mask[sorted(kept)] = True
    return mask


def chain_of(*widths: int) -> tuple[tuple[Group, ...], CostModel]:
    """Groups of these sizes, the layers of a plain network one behind the other, and what they cost."""
    net, inputs = nn.Sequential(*starmap(nn.Linear, pairwise((1, *widths, 1)))), (torch.empty(1, 1),)
    channel_map = discover(net, inputs)
    return channel_map.groups, CostModel(net, channel_map, inputs)


class Net(nn.Module):
    """Layers by name and a forward function over them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class SmallNet(nn.Module):
    """conv - BN - ReLU - conv - BN - ReLU - pool - flatten - linear: two groups, one atom at four columns."""

    def __init__(self, widths: tuple[int, int] = (6, 8), classes: int = 4, batch_norm: bool = True) -> None:
        super().__init__()
        a, b = widths
        self.conv1 = nn.Conv2d(2, a, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(a) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(b) if batch_norm else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * b, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.pool(x).flatten(1))


def small_map(net: SmallNet) -> ChannelMap:
    """The map of a ``SmallNet``, written by hand."""
    builder = MapBuilder(net)
    first, second = (builder.group(f"conv{n}", net.get_submodule(f"conv{n}").out_channels) for n in (1, 2))
    for number, atoms in ((1, first), (2, second)):
        builder.rows(f"conv{number}", atoms)
        if isinstance(net.norm1, nn.BatchNorm2d):
            builder.rows(f"norm{number}", atoms)
    builder.columns("conv2", first)
    builder.columns("head", second.repeat_interleave(4))
    return builder.build()
