"""What a run would be, without images, weights or files: its network, its cost, its steps, its goal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel, flops_by_weight, train_cost_saving
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.config.run import RunConfig
from offload_sparse.policy.budget import evenly_narrowed
from offload_sparse.policy.published_widths import static_mask
from offload_sparse.policy.width_search import WidthSearch, build_policy, cycles_and_pairs
from offload_sparse.workloads.data.loader import DeclaredData, declared_data
from offload_sparse.workloads.data.order import steps_per_epoch
from offload_sparse.workloads.models import build_model, input_channels, takes_tokens

_SHORT = 8
"""Tokens of the sequence that channels are looked for with."""


@dataclass(frozen=True)
class Structure:
    """The channels of a network and what they cost; the full network and the tensors that it can be called
    with, one image or sequence, are on the meta device."""

    channel_map: ChannelMap
    cost: CostModel
    model: nn.Module
    inputs: tuple[Tensor, ...]


def dry_run(
    config: RunConfig, structure: Structure | None = None, data: DeclaredData | None = None
) -> dict[str, Any]:
    """The figures of a run that can be known beforehand; nothing is read or written. ``structure`` and
    ``data`` are given where they are known already.

    ``config`` has no ``auto`` left for what a device decides (see ``resolve``). The subnetwork is the one
    whose groups all keep ``policy.rho`` of their channels: the expected widths at the start, where every keep
    probability is rho. Of RigL's layers it is their densities that count. Raises ValueError: the network
    cannot be built or narrowed, or the data section leaves something open."""
    data = data or declared_data(config.data)
    structure = structure or structure_of(config, data)
    channel_map, cost = structure.channel_map, structure.cost
    full = channel_map.full_mask()
    per_epoch = steps_per_epoch(data.train_images, config.data.batch_size)
    steps = config.train.steps(per_epoch)
    dense, parameters = cost.flops(full), cost.parameters(full)
    masks = trained_masks(config, structure, steps)
    kept_parameters, kept_flops = _kept(config, structure, masks[-1])
    family = [cost.flops(mask) for mask in masks] if len(config.budgets) > 1 else []
    run = passes(config, kept_flops, steps, len(channel_map.groups), family)
    return {
        "method": config.method,
        "model": config.model.name,
        "dataset": config.data.name,
        "knob": knob(config),
        "groups": len(channel_map.groups),
        "channels": channel_map.num_atoms,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "dense_parameters": parameters,
        "dense_flops": dense,
        "parameters": kept_parameters,
        "flops": kept_flops,
        "params_ratio": kept_parameters / parameters,
        "flops_ratio": kept_flops / dense,
        "train_cost_saving": train_cost_saving(dense, run, steps),
        "paper": config.paper,
    }


def knob(config: RunConfig) -> str:
    """The setting that decides how much a method keeps, as its users know it."""
    policy = config.policy
    knobs = {
        "dense": "all weights",
        "dst": f"alpha {config.dst.alpha:g}",
        "dfbst": f"alpha {config.dst.alpha:g}, beta {config.dfbst.beta:g}",
        **dict.fromkeys(("rigl", "grow_efficient"), f"rho {policy.rho:g}"),  # of weights, of channels
    }
    budget = "" if policy.budget == "count" else f" of the {policy.budget}"
    shares = ", ".join(f"{share:g}" for share in config.budgets or [policy.rho])
    return knobs.get(config.method, f"rho {shares}{budget}")


def model_arguments(config: RunConfig, data: DeclaredData) -> dict[str, Any]:
    """Arguments of ``build_model`` that fit the data, with those of the configuration on top. Raises
    ValueError: these leave no output for some class, or read other channels than images can be given."""
    own = {
        "num_classes": data.num_classes,
        "in_channels": input_channels(config.model.name, data.channels),
        "image_size": min(data.image_shape),
    }
    arguments = own | config.model.arguments
    outputs = arguments["num_classes"]
    if not isinstance(outputs, int) or outputs < data.num_classes:
        raise ValueError(
            f"model.arguments.num_classes is {outputs!r}, and there are {data.num_classes} classes; remove it"
        )
    if (channels := arguments["in_channels"]) not in (data.channels, 3):
        raise ValueError(
            f"model.arguments.in_channels is {channels!r}, and the images have {data.channels}; remove it, "
            "or set it to 3, to which grey images are repeated"
        )
    return arguments


def model_on_meta(config: RunConfig, data: DeclaredData) -> nn.Module:
    """The network of ``config`` on the meta device. Raises ValueError: it cannot be built, or does not take
    these data."""
    (inputs,) = example_inputs(config, data, 2)
    model = build_on_meta(lambda: build_model(config.model.name, **model_arguments(config, data)))
    try:
        with torch.no_grad():
            model(inputs)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        if "meta" in str(error):  # it reads values, of which there are none here
            return model
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        size, what = " x ".join(map(str, inputs.shape[1:])), "tokens" if data.tokens else "images"
        raise ValueError(
            f"{config.model.name} does not take {size} {what} ({reason}); set data.image_size, which "
            "makes squares, or the model's own argument for it"
        ) from None
    return model


def example_inputs(config: RunConfig, data: DeclaredData, number: int) -> tuple[Tensor]:
    """So many images, or sequences of tokens, on the meta device. Raises ValueError: images are declared for
    a network of tokens, or the other way round."""
    name = config.model.name
    if takes_tokens(name) != bool(data.tokens):
        raise ValueError(
            f"{name} reads tokens, and no command trains on those; `plan` takes their number as "
            "data.declared.tokens, and launch/own_loop_lm.py is a loop of one's own"
            if takes_tokens(name)
            else f"{name} reads images; remove data.declared.tokens"
        )
    if data.tokens:
        return (torch.zeros(number, data.tokens, dtype=torch.int64, device="meta"),)
    channels = model_arguments(config, data)["in_channels"]
    return (torch.empty(number, channels, *data.image_shape, device="meta"),)


def structure_of(config: RunConfig, data: DeclaredData) -> Structure:
    """The network of ``config``, built on the meta device, and its channels; ``atoms.block`` is what it is on
    the device of the run."""
    from offload_sparse.channels.discovery import discover

    model, inputs = model_on_meta(config, data), example_inputs(config, data, 1)
    # What goes with what is the same in a short sequence; every layer of a deep network takes its time.
    short = example_inputs(config, replace(data, tokens=min(data.tokens, _SHORT)), 1)
    assert config.atoms.block != "auto", "another device has other channels: resolve() comes first"
    channel_map = block_atoms(discover(model, short, config.model.residual), config.atoms.block)
    return Structure(channel_map, CostModel(model, channel_map, inputs), model, inputs)


def trained_masks(config: RunConfig, structure: Structure, steps: int = 0) -> list[Tensor]:
    """bool[C]: the channels of the network that a run of ``steps`` steps begins with, and behind them those
    of the members of a family, the smallest first; all where its method narrows none. Raises ValueError: the
    search begins with no ``static.widths``, or they do not fit."""
    channel_map, cost, widths = structure.channel_map, structure.cost, str(config.static.widths)
    if config.method == "static":
        return [static_mask(widths, config.policy, channel_map, cost)]
    if config.method == "sparse_offload":
        search = config.round.freeze_step(config.policy.search, steps), steps
        policy = build_policy(config.policy, channel_map, config.train.seed, cost, *search, widths=widths)
        if isinstance(policy, WidthSearch):
            return [policy.mask, *policy.family()]
        return [evenly_narrowed(config.policy, channel_map, cost)]
    return [channel_map.full_mask()]


def _kept(config: RunConfig, structure: Structure, mask: Tensor) -> tuple[float, float]:
    """Parameters and forward FLOPs of the network that is trained, of these channels: of all weights where
    only training shows how many are left."""
    if config.method == "rigl":
        return _kept_by_rigl(config, structure)
    return structure.cost.parameters(mask), structure.cost.flops(mask)


def _kept_by_rigl(config: RunConfig, structure: Structure) -> tuple[float, float]:
    from offload_sparse.methods.weight_masks.rigl import erk_densities
    from offload_sparse.methods.weight_masks.sparsity import maskable_weights

    weights = maskable_weights(structure.model)
    flops = flops_by_weight(structure.model, structure.inputs)
    densities = erk_densities([tuple(weight.shape) for weight in weights.values()], config.policy.rho)
    parameters, left = float(structure.cost.dense_parameters), float(structure.cost.dense_flops)
    for (name, weight), density in zip(weights.items(), densities, strict=True):
        parameters -= (1 - density) * weight.numel()
        left -= (1 - density) * flops[name]
    return parameters, left


def passes(
    config: RunConfig, flops: float, steps: int, groups: int, family: Sequence[float] = ()
) -> Iterator[tuple[float, int, int]]:
    """(forward FLOPs, forwards, backwards) of the passes of a run of ``steps`` steps on a network of
    ``flops``.

    Every step trains one subnet: a forward and a backward pass. While s is learned, the reference loss takes
    a further forward pass: at each step (``every_step``, ``turns``) or at the first of each round
    (``round_start``); none where every rank trains a subnet of its own. A probe of a search for widths is two
    forward passes per pair. Behind the search, which trains the first of the ``family``, a step trains the
    largest of the others (its members), the smallest and one between."""
    total, search = steps, config.policy.search
    if family:
        flops, *members = family
        steps = config.round.freeze_step(search, total) if search == "probe" else 0
        between = fmean(members[1:-1]) if len(members) > 2 else 0
        yield members[0] + between + members[-1], total - steps, total - steps
    searches = config.method == "sparse_offload" and config.policy.rho < 1
    compared = config.round.freeze_step(search, steps) // 2 if searches and search == "forward" else 0
    yield flops, steps, steps - compared
    if not searches:
        return
    if search == "probe":
        cycles, pairs = cycles_and_pairs(groups, config.round.freeze_step(search, total), total)
        yield flops, 2 * cycles * pairs, 0
    elif search in ("sampled", "forward") and not config.round.own_subnets:
        learned = config.round.freeze_step(search, steps)
        once_per_round = config.round.reference == "round_start"
        yield flops, -(-learned // config.round.k) if once_per_round else learned, 0


def dry_run_table(figures: dict[str, Any]) -> Table:
    """The expected subnetwork beside the dense network and the row of the paper."""
    paper: dict[str, Any] = figures["paper"]

    def goal(name: str, unit: str = " %") -> str:
        return f"{paper[name]:g}{unit}" if paper.get(name) else ""

    title = f"{figures['model']} on {figures['dataset']}, {figures['method']}, {figures['knob']}"
    table = Table("", "dense", "expected", paper.get("source") or "paper", title=title)
    million = "{:.3f} M".format
    table.add_row(
        "parameters", million(figures["dense_parameters"] / 1e6), million(figures["parameters"] / 1e6)
    )
    table.add_row("FLOPs per input", million(figures["dense_flops"] / 1e6), million(figures["flops"] / 1e6))
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
