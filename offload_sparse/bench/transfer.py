"""Gather and scatter of a wide ResNet-50 against a plain copy of the bytes and against chained indexing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import median_ratio, take_turns
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import random_mask
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.store.copy import host_copy
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import Narrow, fetch_plan
from offload_sparse.store.host_memory import host_zeros
from offload_sparse.store.partition import Partition
from offload_sparse.workloads.models import build_model

LINE = 64
"""Bytes of a cache line: the least that memory hands out."""

WIDE_BLOCK = 8
"""``atoms.block`` of the second row of every rho."""

CACHES = 96 << 20
"""Bytes that are written to empty the caches."""


def run(quick: bool) -> BenchResult:
    """Four times the usual width at rho = 0.5, 0.25 and 0.1; ``quick`` takes the usual width and fewer
    repetitions."""
    width, repetitions = (64, 5) if quick else (256, 9)
    channel_map, names = wide_resnet50(width)
    layout = Layout.of({name: tuple(channel_map.shapes[name]) for name in names})
    store = host_zeros(layout.size, torch.float32, "off").normal_(generator=torch.Generator().manual_seed(0))
    raw: dict[str, Any] = {"native_kernel": host_copy.load() is not None, "store_bytes": layout.size * 4}
    ratios: dict[str, float] = {}
    rows = []
    for rho in (0.5, 0.25, 0.1):
        for block in (1, WIDE_BLOCK):
            figures = measure(block_atoms(channel_map, block), layout, store, rho, repetitions)
            suffix = f"rho{rho:g}" + (f".block{block}" if block > 1 else "")
            ratios |= {f"transfer.{name}.{suffix}": figures[name] for name in RATIOS}
            raw[suffix] = figures
            shares = (f"{figures[name]:.2f}" for name in (*RATIOS, "lines_bound"))
            rows.append([f"{rho:g}", block, f"{figures['bytes'] / 2**20:.0f}", *shares])
    return BenchResult(ratios, raw, _HEADER, rows)


RATIOS = ("gather_vs_memcpy", "scatter_vs_memcpy", "gather_vs_chained")

_HEADER = (
    *("rho", "block", "MiB moved", "gather / copy (more is better)", "scatter / copy", "gather / chained"),
    "lines bound",
)
"""``lines bound`` is what gather / copy could be at most: memory hands out whole cache lines, and single
entries of 4 bytes each cost one of 64."""


def wide_resnet50(width: int) -> tuple[ChannelMap, tuple[str, ...]]:
    """The map of ResNet-50 with ``width`` channels per group (64 is the usual one), and its parameters."""
    model = build_on_meta(partial(build_model, "torchvision/resnet50", 1000, 3, 64, width_per_group=width))
    channel_map = discover(model, (torch.empty(1, 3, 64, 64, device="meta"),))
    return channel_map, tuple(name for name, _ in model.named_parameters())


def measure(
    channel_map: ChannelMap, layout: Layout, store: Tensor, rho: float, repetitions: int
) -> dict[str, float]:
    """Median seconds of a copy, a gather, a scatter and chained indexing of one random mask; their ratios.

    ``*_vs_memcpy`` is copy time / our time, ``gather_vs_chained`` chained time / our time; medians of the
    ratios of neighbours. ``lines_bound`` is what ``gather_vs_memcpy`` would be if both were only held up by
    the cache lines that they read and write."""
    selection = Selection(channel_map, random_mask(channel_map, rho, torch.Generator().manual_seed(0)))
    narrow = selection.layout(layout.shapes)
    plan = fetch_plan(Partition(layout, 1), 0, Narrow(selection, layout.shapes)).fetched
    assert plan is not None
    taken, copied = (host_zeros(narrow.size, torch.float32, "off") for _ in range(2))
    passes: dict[str, Callable[[], object]] = {
        "memcpy": lambda: copied.copy_(taken),
        "gather": lambda: copy_blocks(plan, [(store, taken)]),
        "scatter": lambda: copy_blocks(plan, [(store, taken)], reverse=True),
        "chained": lambda: chained(layout, selection, narrow, store, copied),
    }
    other = torch.zeros(CACHES // 4)  # between the transfers of a run lie the training steps
    seconds = take_turns(passes, repetitions, between=partial(other.add_, 1))
    assert torch.equal(taken, copied), "our gather and chained indexing must agree"
    return {name: median(values) for name, values in seconds.items()} | {
        "bytes": narrow.size * 4,
        "gather_vs_memcpy": median_ratio(seconds["memcpy"], seconds["gather"]),
        "scatter_vs_memcpy": median_ratio(seconds["memcpy"], seconds["scatter"]),
        "gather_vs_chained": median_ratio(seconds["chained"], seconds["gather"]),
        "lines_bound": lines_bound(plan),
    }


def chained(layout: Layout, selection: Selection, narrow: Layout, store: Tensor, out: Tensor) -> None:
    """The gather as one would write it: rows, then columns, one ``index_select`` after the other."""
    for name in layout.shapes:
        tensor = layout.view(store, name)
        for dim, kept in enumerate(selection.kept[name]):
            if kept is not None:
                tensor = tensor.index_select(dim, kept)
        narrow.view(out, name).copy_(tensor)


def lines_bound(plan: BlockPlan) -> float:
    """Cache lines that a copy reads and writes, as a share of those that a gather reads and writes.

    A copy of n bytes moves 2n (read, written past the caches, as long copies are); a gather moves n and every
    line in which a kept entry lies, whole."""
    lines = 0
    for block in plan.blocks:
        grid = block.source
        units = plan.numbers(grid.units, block.n_units)
        first, last = units * block.unit * 4 // LINE, ((units + 1) * block.unit - 1) * 4 // LINE
        shared = int((first[1:] == last[:-1]).sum())
        per_row = int((last - first + 1).sum()) - shared
        if block.n_units == 1 and block.unit == grid.row_length:  # rows that are neighbours share lines
            per_row = max(1, block.unit * 4 // LINE)
        lines += block.n_rows * per_row
    size = plan.entries * 4
    return 2 * size / (size + lines * LINE)
