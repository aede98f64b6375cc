"""The transfer bench compares copies of the same entries, and its bound counts cache lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offload_sparse.bench.transfer import RATIOS, lines_bound, measure
from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.channels.check import random_mask
from offload_sparse.channels.selection import Layout
from offload_sparse.store.copy.blocks import Numbers
from tests.support.blocks import Block, Grid, plan_of


def small_map() -> ChannelMap:
    atoms = torch.arange(40)
    return ChannelMap(
        (Group("a", 0, 40),), {"w": (40, 40, 3), "b": (40,)}, {"w": (atoms, atoms, None), "b": (atoms,)}
    )


def test_all_sides_move_the_same_entries() -> None:
    channel_map = small_map()
    layout = Layout.of(dict(channel_map.shapes))
    figures = measure(channel_map, layout, torch.randn(layout.size), 0.5, 1)
    kept = int(random_mask(channel_map, 0.5, torch.Generator().manual_seed(0)).sum())
    assert figures["bytes"] == 4 * (kept * kept * 3 + kept)
    assert all(figures[name] > 0 for name in RATIOS)


@pytest.mark.parametrize(
    ("units", "bound"),
    [(np.arange(0, 64, 16), 2 / (1 + 16)), (np.arange(16), 1.0), (None, 1.0)],
)
def test_the_bound_is_the_share_of_whole_lines(units: Numbers | None, bound: float) -> None:
    count = 64 if units is None else len(units)
    plan = plan_of([Block(5, count, 1, Grid(0, 64, None, units), Grid(0, count))])
    assert lines_bound(plan) == pytest.approx(bound)
