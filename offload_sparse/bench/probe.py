"""Forward passes per second of a probe of widths against plain forward passes of the same subnet."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    NETWORKS,
    default_device,
    loss_of,
    median_ratio,
    network_of,
    random_batch,
    take_turns,
)
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.probing import run_probe
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.store.weight_store import Ranks

_CASES = {"vgg19": (0.017, 128), "resnet50": (0.25, 8)}
"""Share of the FLOPs, and images of a batch."""


def run(quick: bool) -> BenchResult:
    """VGG-19 at 1.7 % and ResNet-50 at 25 % of the FLOPs; ``quick`` takes VGG-19 and fewer pairs."""
    raw: dict[str, Any] = {}
    ratios, rows = {}, []
    for name in ("vgg19",) if quick else _CASES:
        figures = raw[name] = measure(name, pairs=12 if quick else 20, repetitions=3 if quick else 7)
        ratio = ratios[f"probe.{name}.vs_forward"] = median_ratio(figures["plain"], figures["probe"])
        rows.append([name, *(f"{1000 * median(figures[k]):.1f}" for k in ("plain", "probe")), f"{ratio:.3f}"])
    return BenchResult(ratios, raw, ("network", "forward ms", "of a probe ms", "ratio"), rows)


def measure(name: str, pairs: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a forward pass in evaluation mode, plain and as part of a probe, in turns."""
    share, count = _CASES[name]
    _, size, _, classes = NETWORKS[name]
    device, model = default_device(), network_of(name)
    example = (torch.zeros(1, 3, size, size),)
    channel_map = discover(model, example)
    config = PolicyConfig(rho=share, budget="flops", search="probe")
    cost = CostModel(model, channel_map, example)
    search = WidthSearch(config, channel_map.groups, 0, cost, 1 << 19, 1 << 20)
    search.pairs = pairs
    module = narrow_module(model, channel_map, search.mask).to(device).eval()
    closure = partial(loss_of, batch=random_batch(count, size, classes, device))
    selection = Selection(channel_map, search.mask)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(2 * pairs):
            closure(module)

    def probe() -> None:
        run_probe(search, module, selection, [closure], Forward(), Ranks(0, 1))

    seconds = take_turns({"plain": plain, "probe": probe}, repetitions)
    return {side: [value / (2 * pairs) for value in values] for side, values in seconds.items()}
