"""FLOPs and step times of the residual policies coupled, internal and filter at ρ = 0.25."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import get_args

import torch
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import one_thread, take_turns
from offload_sparse.channels.accounting import CostModel
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
    with one_thread():
        raw = {name: measure(name, size, 1 if quick else 5) for name, size in MODELS[: 1 if quick else None]}
    ratios: dict[str, float] = {}
    rows = []
    for name, figures in raw.items():
        for policy, found in figures.items():
            shares = found["flops"], found["parameters"], found["seconds"] / figures["dense"]["seconds"]
            rows.append([name, policy, *(f"{share:.3f}" for share in shares)])
            key = f"residual.{name.rpartition('/')[2]}.{policy}"
            if policy != "dense":
                ratios |= {f"{key}.flops_vs_dense": shares[0], f"{key}.step_vs_dense": shares[2]}
    return BenchResult(ratios, raw, ["model", "residual", "FLOPs", "parameters", "step time"], rows)


def measure(name: str, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """By policy (and ``dense``): shares of FLOPs and parameters, and seconds of forward and backward pass."""
    torch.manual_seed(0)
    model, image = build_model(name), (torch.zeros(1, 3, size, size),)
    images = torch.randn(BATCH, 3, size, size)
    figures: dict[str, dict[str, float]] = {"dense": {"flops": 1.0, "parameters": 1.0}}
    passes: dict[str, Callable[[], object]] = {"dense": partial(_pass, model, images)}
    for policy in get_args(Residual):
        channel_map = discover(model, image, policy)
        cost = CostModel(model, channel_map, image)
        mask = random_mask(channel_map, RHO, torch.Generator().manual_seed(0))
        passes[policy] = partial(_pass, narrow_module(model, channel_map, mask), images)
        figures[policy] = {
            "flops": cost.flops(mask) / cost.dense_flops,
            "parameters": cost.parameters(mask) / cost.dense_parameters,
        }
    for policy, seconds in take_turns(passes, repeats).items():
        figures[policy]["seconds"] = median(seconds)
    return figures


def _pass(network: nn.Module, images: Tensor) -> None:
    network(images).sum().backward()
