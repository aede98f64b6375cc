"""Forward and backward time of our subnet against the dense network and a hand-made narrow one.

``narrow`` is a network of ordinary parameters with the same widths, as one would write it by hand; ours lies
over flat buffers. ``vs_narrow`` is the median of the ratios of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    NETWORKS,
    Batch,
    batch_of,
    default_device,
    loss_of,
    median_ratio,
    network_of,
    take_turns,
)
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import Subnet, narrow_module
from offload_sparse.engine.gradients import FlatGradients
from offload_sparse.engine.losses import TAIL

_HEADER = ("network", "rho", "dense ms", "narrow ms", "ours ms", "ours/dense", "FLOPs ratio", "ours/narrow")


def run(quick: bool) -> BenchResult:
    """Every network at rho = 0.5, 0.25 and 0.1; ``quick`` takes one network at 0.25 and fewer repetitions."""
    device = default_device()
    rhos, repetitions = ((0.25,), 5) if quick else ((0.5, 0.25, 0.1), 7)
    result = BenchResult({}, {}, _HEADER, [])
    for name in ("resnet20",) if quick else NETWORKS:
        for rho, figures in measure_network(name, rhos, repetitions, device).items():
            key = f"step.{name}.rho{rho:g}"
            shares = (figures["subnet"] / figures["dense"], figures["flops_ratio"], figures["vs_narrow"])
            result.ratios |= {f"{key}.vs_dense": shares[0], f"{key}.vs_narrow": shares[2]}
            result.raw[key] = figures
            milliseconds = (f"{1000 * figures[side]:.1f}" for side in ("dense", "narrow", "subnet"))
            result.table.append([name, f"{rho:g}", *milliseconds, *(f"{share:.3f}" for share in shares)])
    return result


def measure_network(
    name: str, rhos: tuple[float, ...], repetitions: int, device: torch.device
) -> dict[float, dict[str, float]]:
    """Median seconds of one forward and backward pass of each network, and their ratios, per rho."""
    torch.manual_seed(0)
    dense, batch = network_of(name).to(device), batch_of(name, device)
    example = (batch[0][:1],)
    channel_map = discover(dense, example)
    cost = CostModel(dense, channel_map, example)
    results = {}
    for rho in rhos:
        mask = channel_map.uniform_mask(rho)
        passes: dict[str, Callable[[], object]] = {
            "dense": partial(one_pass, dense, batch),
            "narrow": partial(one_pass, narrow_module(dense, channel_map, mask), batch),
            "subnet": flat_pass(flat_subnet(dense, channel_map, mask, device), batch),
        }
        seconds = take_turns(passes, repetitions)
        results[rho] = {k: median(v) for k, v in seconds.items()} | {
            "vs_narrow": median_ratio(seconds["subnet"], seconds["narrow"]),
            "flops_ratio": cost.flops(mask) / cost.dense_flops,
        }
    return results


def flat_subnet(model: nn.Module, channel_map: ChannelMap, mask: Tensor, device: torch.device) -> nn.Module:
    """The subnet of ``mask`` over flat buffers, with the values of ``model``."""
    selection = Selection(channel_map, mask)
    integers = {n: b for n, b in model.named_buffers() if not b.is_floating_point()}
    subnet = Subnet(model, device, integers)
    values = narrow_module(model, channel_map, mask).state_dict()
    weights, buffers = (
        torch.cat([values[name].flatten() for name in names]).to(device)
        for names in (subnet.parameter_names, subnet.buffer_names)
    )
    subnet.bind(selection, weights, buffers)
    return subnet.module.train()


def one_pass(network: nn.Module, batch: Batch) -> None:
    """One forward and backward pass."""
    network.zero_grad(set_to_none=True)
    loss_of(network, batch).backward()


def flat_pass(subnet: nn.Module, batch: Batch) -> Callable[[], None]:
    """The same of a subnet, whose gradients end in a flat buffer."""
    parameters = list(subnet.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    gradients = FlatGradients(parameters, parameters[0].new_empty(size + TAIL))

    def run_once() -> None:
        gradients.begin(1)
        loss_of(subnet, batch).backward()
        gradients.end([])

    return run_once
