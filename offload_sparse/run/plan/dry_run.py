"""What a run would be, without images, weights or files: its network, its cost, its steps, its goal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel, train_cost_saving
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.config.run import RunConfig
from offload_sparse.policy.budget import evenly_narrowed
from offload_sparse.policy.published_widths import static_mask
from offload_sparse.workloads.data.loader import DeclaredData, declared_data
from offload_sparse.workloads.data.order import steps_per_epoch
from offload_sparse.workloads.models import build_model, input_channels


@dataclass(frozen=True)
class Structure:
    """The channels of a network and what they cost.

    Attributes:
        channel_map: its channels.
        cost: parameters and FLOPs of any mask.
        model: the full network on the meta device.
        inputs: tensors that it can be called with, one image, on the meta device.
    """

    channel_map: ChannelMap
    cost: CostModel
    model: nn.Module
    inputs: tuple[Tensor, ...]


def dry_run(config: RunConfig, structure: Structure | None = None) -> dict[str, Any]:
    """The figures of a run that can be known beforehand; nothing is read or written.

    The subnetwork is the one whose groups all keep ``policy.rho`` of their channels: the expected widths at
    the start, where every keep probability is rho.

    Args:
        structure: the network, if it is known already.

    Raises:
        ValueError: the network cannot be built or narrowed, or the data section leaves something open.
    """
    data = declared_data(config.data)
    structure = structure or structure_of(config, data)
    channel_map, cost = structure.channel_map, structure.cost
    full, mask = channel_map.full_mask(), _mask(config, structure)
    per_epoch = steps_per_epoch(data.train_images, config.data.batch_size)
    steps = config.train.max_steps or config.train.epochs * per_epoch
    dense, narrow = cost.flops(full), cost.flops(mask)
    return {
        "method": config.method,
        "model": config.model.name,
        "dataset": config.data.name,
        "rho": config.policy.rho,
        "groups": len(channel_map.groups),
        "channels": channel_map.num_atoms,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "dense_parameters": cost.parameters(full),
        "dense_flops": dense,
        "parameters": cost.parameters(mask),
        "flops": narrow,
        "params_ratio": cost.parameters(mask) / cost.parameters(full),
        "flops_ratio": narrow / dense,
        "train_cost_saving": train_cost_saving(dense, passes(config, narrow, steps), steps),
        "paper": config.paper,
    }


def model_on_meta(config: RunConfig, data: DeclaredData) -> tuple[nn.Module, int]:
    """The network of ``config`` on the meta device, and the channels of its images."""
    channels = input_channels(config.model.name, data.channels)
    arguments: dict[str, Any] = {
        "num_classes": data.num_classes,
        "in_channels": channels,
        "image_size": data.image_size,
    }
    with torch.device("meta"):
        return build_model(config.model.name, **(arguments | config.model.arguments)), channels


def structure_of(config: RunConfig, data: DeclaredData) -> Structure:
    """The network of ``config``, built on the meta device, and its channels."""
    from offload_sparse.channels.discovery import discover

    model, channels = model_on_meta(config, data)
    with torch.device("meta"):
        inputs = (torch.empty(1, channels, data.image_size, data.image_size),)
    channel_map = block_atoms(discover(model, inputs, config.model.residual), config.atoms.block)
    return Structure(channel_map, CostModel(model, channel_map, inputs), model, inputs)


def _mask(config: RunConfig, structure: Structure) -> Tensor:
    channel_map = structure.channel_map
    if config.method == "static":
        return static_mask(config.static.widths, config.policy, channel_map, structure.cost)
    if config.method == "sparse_offload":
        return evenly_narrowed(config.policy, channel_map, structure.cost)
    return channel_map.full_mask()


def passes(config: RunConfig, flops: float, steps: int) -> Iterator[tuple[float, int, int]]:
    """(forward FLOPs, forwards, backwards) of the passes of a run of ``steps`` steps on a network of
    ``flops``.

    Every step trains one subnet: a forward and a backward pass. While s is learned, the reference loss takes
    a further forward pass: at each step (``every_step``, ``turns``) or at the first of each round
    (``round_start``).
    """
    yield flops, steps, steps
    if config.method == "sparse_offload" and config.policy.rho < 1:
        learned = round(config.round.freeze_at * steps)
        once_per_round = config.round.reference == "round_start"
        yield flops, -(-learned // config.round.k) if once_per_round else learned, 0


def dry_run_table(figures: dict[str, Any]) -> Table:
    """The expected subnetwork beside the dense network and the row of the paper."""
    paper: dict[str, Any] = figures["paper"]

    def goal(name: str, unit: str = " %") -> str:
        return f"{paper[name]:g}{unit}" if paper.get(name) else ""

    title = f"{figures['model']} on {figures['dataset']}, {figures['method']}, rho {figures['rho']:g}"
    table = Table("", "dense", "expected", paper.get("source") or "paper", title=title)
    million = "{:.3f} M".format
    table.add_row(
        "parameters", million(figures["dense_parameters"] / 1e6), million(figures["parameters"] / 1e6)
    )
    table.add_row("FLOPs per image", million(figures["dense_flops"] / 1e6), million(figures["flops"] / 1e6))
    params, flops = (f"{100 * figures[f'{name}_ratio']:.2f} %" for name in ("params", "flops"))
    table.add_row("parameters kept", "100 %", params, goal("params"))
    table.add_row("FLOPs kept", "100 %", flops, goal("flops"))
    table.add_row(
        "train-cost saving", "1x", f"{figures['train_cost_saving']:.2f}x", goal("train_cost_saving", "x")
    )
    table.add_row("accuracy", goal("dense_accuracy"), "", goal("accuracy"))
    table.add_row("groups, channels", "", f"{figures['groups']}, {figures['channels']}")
    table.add_row("steps (per epoch)", "", f"{figures['steps']} ({figures['steps_per_epoch']})")
    return table
