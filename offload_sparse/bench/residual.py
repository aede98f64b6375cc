"""FLOPs and step times of the residual policies coupled, internal and filter at ρ = 0.25."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import random_mask
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.workloads.models import build_model

RHO = 0.25
BATCH = 8
MODELS = (("offload_sparse/resnet20_cifar", 32), ("torchvision/resnet50", 64))


def run(quick: bool) -> BenchResult:
    """One random mask per policy, on one CPU thread; ``quick`` leaves ResNet-50 out and times fewer steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        raw = {name: measure(name, size, 1 if quick else 5) for name, size in MODELS[: 1 if quick else None]}
    finally:
        torch.set_num_threads(threads)
    ratios: dict[str, float] = {}
    rows = []
    for name, figures in raw.items():
        for policy, found in figures.items():
            seconds = found["seconds"] / figures["dense"]["seconds"]
            rows.append(
                [name, policy, f"{found['flops']:.3f}", f"{found['parameters']:.3f}", f"{seconds:.3f}"]
            )
            key = f"residual.{name.rpartition('/')[2]}.{policy}"
            if policy != "dense":
                ratios |= {f"{key}.flops_vs_dense": found["flops"], f"{key}.step_vs_dense": seconds}
    return BenchResult(ratios, raw, ["model", "residual", "FLOPs", "parameters", "step time"], rows)


def measure(name: str, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """By policy (and ``dense``): shares of FLOPs and parameters, and seconds of forward and backward pass."""
    torch.manual_seed(0)
    model, image = build_model(name), (torch.zeros(1, 3, size, size),)
    networks: dict[str, nn.Module] = {"dense": model}
    figures: dict[str, dict[str, float]] = {"dense": {"flops": 1.0, "parameters": 1.0}}
    for policy in get_args(Residual):
        channel_map = discover(model, image, policy)
        networks[policy], figures[policy] = _sampled(model, channel_map, image)
    for policy, seconds in _step_seconds(networks, torch.randn(BATCH, 3, size, size), repeats).items():
        figures[policy]["seconds"] = seconds
    return figures


def _sampled(
    model: nn.Module, channel_map: ChannelMap, image: tuple[Tensor, ...]
) -> tuple[nn.Module, dict[str, float]]:
    cost = CostModel(model, channel_map, image)
    mask = random_mask(channel_map, RHO, torch.Generator().manual_seed(0))
    shares = {
        "flops": cost.flops(mask) / cost.dense_flops,
        "parameters": cost.parameters(mask) / cost.dense_parameters,
    }
    return narrow_module(model, channel_map, mask), shares


def _step_seconds(networks: Mapping[str, nn.Module], images: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward pass; networks take turns, after one step not counted."""
    seconds: dict[str, list[float]] = {policy: [] for policy in networks}
    for _ in range(1 + repeats):
        for policy, network in networks.items():
            start = time.perf_counter()
            network(images).sum().backward()
            seconds[policy].append(time.perf_counter() - start)
    return {policy: statistics.median(values[1:]) for policy, values in seconds.items()}
