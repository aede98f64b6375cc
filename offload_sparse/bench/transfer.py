"""Gather and scatter of a wide ResNet-50 against a plain copy of the bytes and against chained indexing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import take_turns
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.store.copy import host_copy
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import Narrow, fetch_plan
from offload_sparse.store.copy.tables import Tables
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
    raw: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "native_kernel": host_copy.load() is not None,
        "store_bytes": layout.size * 4,
    }
    ratios: dict[str, float] = {}
    rows: list[list[str]] = []
    for rho in (0.5, 0.25, 0.1):
        for block in (1, WIDE_BLOCK):
            figures = measure(block_atoms(channel_map, block), layout, store, rho, repetitions)
            suffix = f"rho{rho:g}" + (f".block{block}" if block > 1 else "")
            ratios |= {f"transfer.{name}.{suffix}": figures[name] for name in RATIOS}
            raw[suffix] = figures
            rows.append(_row(rho, block, figures))
    return BenchResult(ratios, raw, HEADER, rows)


RATIOS = ("gather_vs_memcpy", "scatter_vs_memcpy", "gather_vs_chained")

HEADER = (
    *("rho", "block", "MiB moved", "copy GB/s", "gather", "scatter", "chained"),
    *("gather / copy (more is better)", "scatter / copy", "lines bound", "gather / chained", "plan CPU ms"),
)
"""``lines bound`` is what the two shares before it could be at most: memory hands out whole cache lines, and
single entries of 4 bytes each cost one of 64. ``plan CPU ms`` is done once per mask and serves all optimizer
slots; it is not part of the other times."""


def _row(rho: float, block: int, figures: Mapping[str, float]) -> list[str]:
    speeds = (figures["bytes"] / figures[side] / 1e9 for side in SIDES)
    shares = ("gather_vs_memcpy", "scatter_vs_memcpy", "lines_bound", "gather_vs_chained")
    moved, planned = f"{figures['bytes'] / 2**20:.0f}", f"{1000 * figures['plan_seconds']:.1f}"
    numbers = (*speeds, *(figures[share] for share in shares))
    return [f"{rho:g}", str(block), moved, *(f"{number:.2f}" for number in numbers), planned]


SIDES = ("memcpy", "gather", "scatter", "chained")


def wide_resnet50(width: int) -> tuple[ChannelMap, tuple[str, ...]]:
    """The map of ResNet-50 with ``width`` channels per group (64 is the usual one), and its parameters."""
    with torch.device("meta"):
        model = build_model("torchvision/resnet50", 1000, 3, 64, width_per_group=width)
    channel_map = discover(model, (torch.empty(1, 3, 64, 64, device="meta"),))
    return channel_map, tuple(name for name, _ in model.named_parameters())


def measure(
    channel_map: ChannelMap, layout: Layout, store: Tensor, rho: float, repetitions: int
) -> dict[str, float]:
    """Median seconds of a copy, a gather, a scatter and chained indexing of one random mask; their ratios.

    ``*_vs_memcpy`` is copy time / our time, ``gather_vs_chained`` chained time / our time; medians of the
    ratios of neighbours. ``lines_bound`` is what ``gather_vs_memcpy`` would be if both were only held up by
    the cache lines that they read and write; ``plan_seconds`` is CPU time."""
    selection = Selection(channel_map, random_mask(channel_map, rho))
    narrow = selection.layout(layout.shapes)
    start = time.process_time()
    plan = fetch_plan(Partition(layout, 1), 0, Narrow(selection, layout.shapes)).fetched
    assert plan is not None
    assert plan.derived(Tables).addresses  # the tables of the kernel are made when they are first read
    planning = time.process_time() - start
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

    def against(side: str, ours: str) -> float:
        return median(a / b for a, b in zip(seconds[side], seconds[ours], strict=True))

    return {name: median(values) for name, values in seconds.items()} | {
        "bytes": narrow.size * 4,
        "plan_seconds": planning,
        "gather_vs_memcpy": against("memcpy", "gather"),
        "scatter_vs_memcpy": against("memcpy", "scatter"),
        "gather_vs_chained": against("chained", "gather"),
        "lines_bound": lines_bound(plan),
    }


def random_mask(channel_map: ChannelMap, rho: float) -> Tensor:
    """bool[C]: ``round(rho * size)`` random atoms of every group, at least one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(channel_map.num_atoms, dtype=torch.bool)
    for group in channel_map.groups:
        kept = torch.randperm(group.size, generator=generator)[: max(1, round(rho * group.size))]
        mask[group.start + kept] = True
    return mask


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
        units = np.arange(block.n_units) if grid.units is None else grid.units
        first, last = units * block.unit * 4 // LINE, ((units + 1) * block.unit - 1) * 4 // LINE
        shared = int((first[1:] == last[:-1]).sum())
        per_row = int((last - first + 1).sum()) - shared
        if block.n_units == 1 and block.unit == grid.row_length:  # rows that are neighbours share lines
            per_row = max(1, block.unit * 4 // LINE)
        lines += block.n_rows * per_row
    size = plan.entries * 4
    return 2 * size / (size + lines * LINE)
