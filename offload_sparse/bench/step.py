"""Forward and backward time of our subnet against the dense network and a hand-made narrow one."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import Subnet, narrow_module
from offload_sparse.workloads.models import build_model

NETWORKS: dict[str, tuple[str, int, int, int]] = {
    "vgg19": ("offload_sparse/vgg19_cifar", 32, 32, 10),
    "resnet20": ("offload_sparse/resnet20_cifar", 32, 64, 10),
    "resnet50": ("torchvision/resnet50", 224, 4, 1000),
    "mobilenetv1": ("timm/mobilenetv1_100", 224, 4, 1000),
}
"""Name, image side, batch size, classes."""

_QUICK = ("resnet20",)


def run(quick: bool) -> BenchResult:
    """Every network at rho = 0.5, 0.25 and 0.1; ``quick`` takes one network at 0.25 and fewer repetitions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rhos, repetitions = ((0.25,), 5) if quick else ((0.5, 0.25, 0.1), 7)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads()}
    rows: list[list[str]] = []
    for name in _QUICK if quick else NETWORKS:
        for rho, figures in measure_network(name, rhos, repetitions, device).items():
            key = f"step.{name}.rho{rho:g}"
            ratios[f"{key}.vs_dense"] = figures["subnet"] / figures["dense"]
            ratios[f"{key}.vs_narrow"] = figures["vs_narrow"]
            raw[key] = figures
            milliseconds = (f"{1000 * figures[side]:.1f}" for side in ("dense", "narrow", "subnet"))
            shares = (ratios[f"{key}.vs_dense"], figures["flops_ratio"], ratios[f"{key}.vs_narrow"])
            rows.append([name, f"{rho:g}", *milliseconds, *(f"{share:.3f}" for share in shares)])
    header = [
        "network",
        "rho",
        "dense ms",
        "narrow ms",
        "ours ms",
        "ours/dense",
        "FLOPs ratio",
        "ours/narrow",
    ]
    return BenchResult(ratios, raw, header, rows)


def measure_network(
    name: str, rhos: tuple[float, ...], repetitions: int, device: torch.device
) -> dict[float, dict[str, float]]:
    """Median seconds of one forward and backward pass of each network, and their ratios, per rho.

    ``narrow`` is a network of ordinary parameters with the same widths, as one would write it by hand;
    ``subnet`` is ours, over flat buffers. The three take turns, so that a change of the machine's speed meets
    all of them; ``vs_narrow`` is the median of the ratios of neighbours.
    """
    model_name, size, batch, classes = NETWORKS[name]
    torch.manual_seed(0)
    dense = build_model(model_name, classes, 3, size).to(device)
    images, labels = (
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(classes, (batch,)).to(device),
    )
    channel_map = discover(dense, (images[:1],))
    cost = CostModel(dense, channel_map, (images[:1],))
    results = {}
    for rho in rhos:
        mask = channel_map.uniform_mask(rho)
        networks = {
            "dense": dense,
            "narrow": narrow_module(dense, channel_map, mask),
            "subnet": flat_subnet(dense, channel_map, mask, device),
        }
        seconds = take_turns({k: pass_of(net, images, labels, k) for k, net in networks.items()}, repetitions)
        pairs = zip(seconds["subnet"], seconds["narrow"], strict=True)
        results[rho] = {k: median(v) for k, v in seconds.items()} | {
            "vs_narrow": median(ours / hand for ours, hand in pairs),
            "flops_ratio": cost.flops(mask) / cost.dense_flops,
        }
    return results


def flat_subnet(model: nn.Module, channel_map: ChannelMap, mask: Tensor, device: torch.device) -> nn.Module:
    """The subnet of ``mask`` over flat buffers, with the values of ``model``."""
    selection = Selection(channel_map, mask)
    integers = {n: b for n, b in model.named_buffers() if not b.is_floating_point()}
    subnet = Subnet(model, device, integers)
    values = {n: t.detach().cpu() for n, t in (*model.named_parameters(), *model.named_buffers())}
    weights = torch.cat([selection.take(n, values[n]).flatten() for n in subnet.parameter_names]).to(device)
    buffers = [selection.take(n, values[n]).flatten() for n in subnet.buffer_names]
    subnet.bind(selection, weights, torch.zeros_like(weights), torch.cat(buffers).to(device))
    return subnet.module.train()


def pass_of(network: nn.Module, images: Tensor, labels: Tensor, kind: str) -> Callable[[], None]:
    """One forward and backward pass; the gradients of a subnet stay views of its buffer, others are made
    anew.
    """

    def run_once() -> None:
        if kind != "subnet":
            network.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()

    return run_once


def take_turns(passes: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every pass, in turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repetition in range(repetitions + 1):
        for name, run_once in passes.items():
            _wait()
            start = time.perf_counter()
            run_once()
            _wait()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
