"""One and two processes measured, and a model of 8 to 512 GPUs on counted bytes and named assumptions.

The model is weak scaling: every GPU has its own images, so a step computes the same on any number of them,
and what grows is the exchange. Nothing overlaps, so it errs on the slow side.

    step(N)  = compute + all-reduce(G)            round overhead(N) = bus(2 W / N) + all-gather(W)
    round(N) = K step(N) + round overhead(N)      efficiency(N)     = K compute / round(N)

G are the bytes of a subnet's gradients, W those of both subnets with their optimizer slots: gathered from
the host's shards over the bus, sent to all, and scattered back over the bus, each GPU its own 1/N.
Collectives are rings: all-reduce 2 (N-1)/N bytes/bandwidth + 2 (N-1) latency, all-gather half of that;
beyond one node the gradients are first reduced within nodes, then 1/node of them between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from offload_sparse.bench.contenders import moved_bytes
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import Batch, loss_of, on_ranks, random_batch, timed
from offload_sparse.bench.options import ScaleConfig
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.workloads.models import build_model

GPUS = (8, 16, 32, 64, 128, 256, 512)

_MEASURED = "offload_sparse/vgg19_cifar"
_MODELLED = "torchvision/resnet50"
_BATCH = 16


@dataclass(frozen=True)
class Constants:
    """What one GPU does in a step and in a round.

    Attributes:
        compute_seconds: forward and backward pass of one subnet and the reference loss of the other.
        gradient_bytes: gradients of one subnet.
        round_bytes: weights, optimizer slots and statistics of both subnets.
        k: steps per round.
    """

    compute_seconds: float
    gradient_bytes: float
    round_bytes: float
    k: int


def run(quick: bool, config: ScaleConfig | None = None) -> BenchResult:
    """One and two processes in turns, then the model; ``quick`` measures a narrower network once."""
    config = config or ScaleConfig()
    width, k, repetitions = (0.25, 5, 1) if quick else (1.0, config.k, 3)
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(repetitions):
        for n, figures in found.items():
            figures.append(measure(n, width, config.rho, k, rounds=2))
    measured = {n: {key: median(f[key] for f in found[n]) for key in found[n][0]} for n in found}
    constants = modelled_constants(config)
    ratios = {"scale.p2_vs_p1": measured[2]["images_per_second"] / measured[1]["images_per_second"]}
    rows: list[list[Any]] = [_measured_row(n, figures, measured[1], k) for n, figures in measured.items()]
    curve = {n: round_seconds(n, constants, config) for n in GPUS}
    for n, seconds in curve.items():
        ratios[f"scale.model.n{n}.efficiency"] = efficiency(n, constants, config)
        rows.append(_modelled_row(n, seconds, constants, config))
    lines = assumptions(constants, config)
    rows += [[line, *[""] * 5] for line in lines]
    raw = {"measured": measured, "constants": asdict(constants), "assumptions": lines}
    return BenchResult(ratios, raw | {"config": asdict(config), "round_seconds": curve}, _HEADER, rows)


_HEADER = ("", "ranks", "steps/s", "all-reduce MiB/step", "gather MiB/round", "efficiency")


def measure(world_size: int, width: float, rho: float, k: int, rounds: int) -> dict[str, float]:
    """Ours on this many processes of one thread, the same number of images on each."""
    per_rank = on_ranks(world_size, measure_here, width, rho, k, rounds)
    slowest = min(per_rank, key=lambda figures: figures["steps_per_second"])
    return slowest | {"images_per_second": slowest["steps_per_second"] * _BATCH * world_size}


def measure_here(width: float, rho: float, k: int, rounds: int) -> dict[str, float]:
    """Steps per second of whole rounds (their median) on this rank, and the bytes that ranks exchange."""
    session = SparseOffload(
        partial(build_model, _MEASURED, 10, 3, 32, width=width),
        (torch.empty(1, 3, 32, 32, device="meta"),),
        optimizer_factory(OptimConfig()),
        total_steps=1000 * k,
        policy=PolicyConfig.paper(rho=rho),
        rounds=RoundConfig(k=k),
        setup=Setup(verify=False),
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    batch = random_batch(_BATCH, 32, 10, session.device, torch.Generator().manual_seed(rank))
    seconds = [timed(partial(_round, session, batch, k)) for _ in range(rounds + 1)][1:]
    gathered, _ = moved_bytes(session)
    world_size = session.ranks.world_size
    gradients = sum(side.arrays["weights"].nbytes for side in session.transfers.pair.active) / 2
    return {
        "steps_per_second": k / median(seconds),
        "all_reduce_bytes": gradients if world_size > 1 else 0.0,
        "gather_bytes": gathered * (world_size - 1),
    }


def _round(session: SparseOffload, batch: Batch, k: int) -> None:
    for _ in range(k):
        session.step(partial(loss_of, batch=batch))
    session.records()


def modelled_constants(config: ScaleConfig) -> Constants:
    """Counted on ResNet-50 with ``rho`` of every width, 224 pixels, SGD with momentum, float32.

    A step is a forward and backward pass (3 forward passes' work) and the reference loss (1).
    """
    image = torch.empty(1, 3, 224, 224, device="meta")
    model = build_on_meta(partial(build_model, _MODELLED, 1000, 3, 224))
    channel_map = discover(model, (image,))
    mask = channel_map.uniform_mask(config.rho)
    shapes = Selection(channel_map, mask).shapes
    weights = 4 * sum(torch.Size(shapes[name]).numel() for name, _ in model.named_parameters())
    buffers = 4 * sum(torch.Size(shapes[n]).numel() for n, b in model.named_buffers() if n in shapes)
    flops = 4 * CostModel(model, channel_map, (image,)).flops(mask) * config.gpu_batch
    return Constants(flops / (config.gpu_tflops * 1e12), weights, 2 * (2 * weights + buffers), config.k)


def efficiency(gpus: int, constants: Constants, config: ScaleConfig) -> float:
    """Share of a round that computes."""
    return constants.k * constants.compute_seconds / round_seconds(gpus, constants, config)


def round_seconds(gpus: int, constants: Constants, config: ScaleConfig) -> float:
    """Seconds of a round on ``gpus`` GPUs, nothing overlapped."""
    step = constants.compute_seconds + all_reduce_seconds(gpus, constants.gradient_bytes, config)
    bus = 2 * constants.round_bytes / gpus / (1e9 * config.bus_gbs)
    return constants.k * step + bus + all_gather_seconds(gpus, constants.round_bytes, config)


def all_reduce_seconds(gpus: int, size: float, config: ScaleConfig) -> float:
    """Within nodes first, then between nodes with the part that each GPU owns, then within nodes again."""
    within, nodes = min(gpus, config.gpus_per_node), max(1, gpus // config.gpus_per_node)
    inside = 2 * _ring(within, size, config.link_gbs, config.latency_us)
    return inside + 2 * _ring(nodes, size / within, config.network_gbs, config.latency_us)


def all_gather_seconds(gpus: int, size: float, config: ScaleConfig) -> float:
    """Half of an all-reduce: what arrives between nodes is passed on within them."""
    return all_reduce_seconds(gpus, size, config) / 2


def _ring(members: int, size: float, gbs: float, latency_us: float) -> float:
    """One pass around a ring: every member sends (members - 1) parts of size / members."""
    return (members - 1) * (size / members / (1e9 * gbs) + 1e-6 * latency_us)


def assumptions(constants: Constants, config: ScaleConfig) -> Sequence[str]:
    """What the model takes for granted, one line each."""
    gradients, subnets = (size / 2**20 for size in (constants.gradient_bytes, constants.round_bytes))
    return (
        f"{_MODELLED}, 224 pixels, rho {config.rho:g} in every width, K = {config.k}, SGD with momentum",
        f"{config.gpu_batch} images per GPU and step, {config.gpu_tflops:g} TFLOP/s sustained: "
        f"{1000 * constants.compute_seconds:.2f} ms per step (forward, backward, reference loss)",
        f"float32: gradients {gradients:.1f} MiB, both subnets with momentum {subnets:.1f} MiB",
        f"{config.bus_gbs:g} GB/s per GPU between host and device",
        f"{config.gpus_per_node} GPUs per node, {config.link_gbs:g} GB/s per GPU within a node",
        f"{config.network_gbs:g} GB/s per GPU between nodes, {config.latency_us:g} us per hop",
        "rings within nodes, then between nodes; no overlap of any exchange with compute; no stragglers",
    )


def _measured_row(ranks: int, figures: dict[str, float], single: dict[str, float], k: int) -> list[Any]:
    relative = figures["images_per_second"] / single["images_per_second"] / ranks
    exchanged = (figures["all_reduce_bytes"] / 2**20, figures["gather_bytes"] / 2**20)
    return [f"measured, K = {k}", ranks, f"{figures['steps_per_second']:.2f}", *exchanged, f"{relative:.3f}"]


def _modelled_row(gpus: int, seconds: float, constants: Constants, config: ScaleConfig) -> list[Any]:
    exchanged = (constants.gradient_bytes / 2**20, constants.round_bytes * (gpus - 1) / gpus / 2**20)
    share = efficiency(gpus, constants, config)
    return ["modelled", gpus, f"{constants.k / seconds:.2f}", *exchanged, f"{share:.3f}"]
