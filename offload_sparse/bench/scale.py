"""One and two processes measured, and a model of 8 to 512 GPUs on counted bytes and named assumptions.

The model is weak scaling: every GPU has its own images, so a step computes the same on any number of them,
and what grows is the exchange. Nothing overlaps, so it errs on the slow side.

    step(N)  = compute + all-reduce(G)        overhead(N) = bus((W + T) / N) + all-gather(W)
    round(N) = K step(N) + overhead(N)        efficiency(N) = K compute / round(N)

With ``round.sync round`` only scalars are reduced in a step, and T is brought to the owners of its rows by
way of the hosts:

    step(N)  = compute + all-reduce(scalars)  overhead(N) = bus(W / N + T) + to-owners(T) + all-gather(W)

G are the bytes of a subnet's gradients, T those of the trained subnet with its optimizer slots, W those of T
and of the reference: gathered from the host's shards over the bus, sent to all, and T scattered back over the
bus, each GPU its own 1/N. An all-gather is a ring, (N-1)/N bytes/bandwidth + (N-1) latency; an all-reduce the
faster of two such rings and a tree, 2 bytes/bandwidth + 2 log2(N) latency; beyond one node the gradients are
first reduced within nodes, then 1/node of them between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import loss_of, on_ranks, random_batch, session_of, timed
from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.losses import TAIL
from offload_sparse.workloads.models import build_model

GPUS = (8, 16, 32, 64, 128, 256, 512)

LINKS: Mapping[str, Mapping[str, float]] = {
    "nvlink": {"gpus_per_node": 512},
    "400gbit": {"network_gbs": 50},
    "25gbit": {"network_gbs": 3.125, "gpus_per_node": 1},
    "1gbit": {"network_gbs": 0.125, "gpus_per_node": 1},
}
"""What differs from ``Cluster``: one domain of NVLink, nodes of eight with 400 Gbit/s for each GPU between
them, and machines of one GPU on slower networks.
"""

_MEASURED = "offload_sparse/vgg19_cifar"
_MODELLED = "torchvision/resnet50"
_BATCH, _RHO, _K = 16, 0.25, 50


@dataclass(frozen=True)
class Cluster:
    """What the model takes for granted: sustained arithmetic of a GPU on the narrow network in TFLOP/s, GB/s
    per GPU (host to device; within a node, between nodes, and between processes by way of their hosts'
    memory, per direction), microseconds per hop."""

    gpu_batch: int = 32
    gpu_tflops: float = 20.0
    bus_gbs: float = 20.0
    link_gbs: float = 150.0
    network_gbs: float = 20.0
    host_gbs: float = 5.0
    latency_us: float = 10.0
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Constants:
    """What one GPU does in a step and in a round.

    Attributes:
        compute_seconds: forward and backward pass of one subnet and the reference loss of the other.
        gradient_bytes: gradients of one subnet.
        round_bytes: weights and statistics of both subnets, optimizer slots of the trained one.
        trained_bytes: the part of the trained one."""

    compute_seconds: float
    gradient_bytes: float
    round_bytes: float
    trained_bytes: float
    k: int


def run(quick: bool) -> BenchResult:
    """One and two processes in turns, then the model; ``quick`` measures a narrower network once."""
    width, k, repetitions = (0.25, 5, 1) if quick else (1.0, _K, 3)
    turns = [{n: measure(n, width, k) for n in (1, 2)} for _ in range(repetitions)]
    measured = {n: median(turn[n] for turn in turns) for n in (1, 2)}
    ratios = {"scale.p2_vs_p1": 2 * measured[2] / measured[1]}
    rows: list[list[Any]] = [
        [f"measured, K = {k}", n, f"{rate:.2f}", f"{rate / measured[1]:.3f}"] for n, rate in measured.items()
    ]
    cluster = Cluster()
    constants = modelled_constants(cluster)

    def modelled(name: str, cluster: Cluster, sync: str, shown: Sequence[int]) -> dict[int, float]:
        """Efficiency by number of GPUs, with a row for those that are ``shown``."""
        shares = {n: efficiency(n, constants, cluster, sync) for n in GPUS}
        for n in shown:
            rows.append([name, n, f"{shares[n] / constants.compute_seconds:.2f}", f"{shares[n]:.3f}"])
        return shares

    shares = modelled("modelled", cluster, "step", GPUS)
    ratios |= {f"scale.model.n{n}.efficiency": share for n, share in shares.items()}
    for (link, changes), sync in product(LINKS.items(), ("step", "round")):
        changed = replace(cluster, **changes)  # type: ignore[arg-type]
        shares = modelled(f"{link}, sync {sync}", changed, sync, GPUS[:: len(GPUS) // 2])
        ratios |= {f"scale.model.{link}.{sync}.n{n}": share for n, share in shares.items()}
    lines = assumptions(constants, cluster)
    rows += [[line, *[""] * 3] for line in lines]
    raw = {"steps_per_second": measured, "constants": asdict(constants), "assumptions": lines}
    return BenchResult(ratios, raw, ("", "ranks", "steps/s", "efficiency"), rows)


def measure(world_size: int, width: float, k: int) -> float:
    """Steps per second of ours on this many processes of one thread, the same number of images on each."""
    return min(on_ranks(world_size, measure_here, width, k))


def measure_here(width: float, k: int) -> float:
    """Steps per second of whole rounds (the median of two) on this rank."""
    factory = partial(build_model, _MEASURED, 10, 3, 32, width=width)
    session = session_of(factory, (3, 32, 32), _RHO, RoundConfig(k=k, reference="every_step"))
    rank = dist.get_rank() if dist.is_initialized() else 0
    batch = random_batch(_BATCH, 32, 10, session.device, torch.Generator().manual_seed(rank))

    def a_round() -> None:
        for _ in range(k):
            session.step(partial(loss_of, batch=batch))
        session.records()

    return k / median([timed(a_round) for _ in range(3)][1:])


def modelled_constants(cluster: Cluster) -> Constants:
    """Counted on ResNet-50 with ``_RHO`` of every width, 224 pixels, SGD with momentum, float32.

    A step is a forward and backward pass (3 forward passes' work) and the reference loss (1)."""
    image = torch.empty(1, 3, 224, 224, device="meta")
    model = build_on_meta(partial(build_model, _MODELLED, 1000, 3, 224))
    channel_map = discover(model, (image,))
    mask = channel_map.uniform_mask(_RHO)
    shapes = Selection(channel_map, mask).shapes
    weights = 4 * sum(torch.Size(shapes[name]).numel() for name, _ in model.named_parameters())
    buffers = 4 * sum(torch.Size(shapes[n]).numel() for n, b in model.named_buffers() if n in shapes)
    flops = 4 * CostModel(model, channel_map, (image,)).flops(mask) * cluster.gpu_batch
    seconds, trained = flops / (cluster.gpu_tflops * 1e12), 2 * weights + buffers
    return Constants(seconds, weights, trained + weights + buffers, trained, _K)


def efficiency(gpus: int, constants: Constants, cluster: Cluster, sync: str = "step") -> float:
    """Share of a round that computes."""
    return constants.k * constants.compute_seconds / round_seconds(gpus, constants, cluster, sync)


def round_seconds(gpus: int, constants: Constants, cluster: Cluster, sync: str = "step") -> float:
    """Seconds of a round on ``gpus`` GPUs, nothing overlapped."""
    gathered, trained = constants.round_bytes, constants.trained_bytes
    if sync == "round":
        reduced, bus = 4.0 * TAIL, gathered / gpus + trained
        slowest = min(cluster.host_gbs, cluster.network_gbs if gpus > cluster.gpus_per_node else 1e9)
        exchange = _ring(gpus, trained, slowest, cluster.latency_us)
    else:
        reduced, bus, exchange = constants.gradient_bytes, (gathered + trained) / gpus, 0.0
    step = constants.compute_seconds + all_reduce_seconds(gpus, reduced, cluster)
    exchange += _hierarchical(_ring, gpus, gathered, cluster) + bus / (1e9 * cluster.bus_gbs)
    return constants.k * step + exchange


def all_reduce_seconds(gpus: int, size: float, cluster: Cluster) -> float:
    """Within nodes first, then between nodes with the part that each GPU owns, then within nodes again."""
    return _hierarchical(_all_reduce, gpus, size, cluster)


def _hierarchical(
    collective: Callable[[int, float, float, float], float], gpus: int, size: float, cluster: Cluster
) -> float:
    within, nodes = min(gpus, cluster.gpus_per_node), max(1, gpus // cluster.gpus_per_node)
    inside = collective(within, size, cluster.link_gbs, cluster.latency_us)
    return inside + collective(nodes, size / within, cluster.network_gbs, cluster.latency_us)


def _all_reduce(members: int, size: float, gbs: float, latency_us: float) -> float:
    """Large messages go around a ring, small ones up and down a tree."""
    if members == 1:
        return 0.0
    tree = 2 * (size / (1e9 * gbs) + 1e-6 * latency_us * math.ceil(math.log2(members)))
    return min(2 * _ring(members, size, gbs, latency_us), tree)


def _ring(members: int, size: float, gbs: float, latency_us: float) -> float:
    """One pass around a ring: every member sends (members - 1) parts of size / members."""
    return (members - 1) * (size / members / (1e9 * gbs) + 1e-6 * latency_us)


def assumptions(constants: Constants, cluster: Cluster) -> tuple[str, ...]:
    """What the model takes for granted, one line each."""
    gradients, subnets = (size / 2**20 for size in (constants.gradient_bytes, constants.round_bytes))
    return (
        f"{_MODELLED}, 224 pixels, rho {_RHO:g} in every width, K = {constants.k}, SGD with momentum",
        f"{cluster.gpu_batch} images per GPU and step, {cluster.gpu_tflops:g} TFLOP/s sustained: "
        f"{1000 * constants.compute_seconds:.2f} ms per step (forward, backward, reference loss)",
        f"float32: gradients {gradients:.1f} MiB, both subnets and one momentum {subnets:.1f} MiB",
        f"{cluster.bus_gbs:g} GB/s per GPU between host and device, {cluster.host_gbs:g} GB/s between hosts' "
        "memories (sync round)",
        f"{cluster.gpus_per_node} GPUs per node, {cluster.link_gbs:g} GB/s per GPU within a node",
        f"{cluster.network_gbs:g} GB/s per GPU between nodes, {cluster.latency_us:g} us per hop",
        "rings or trees within nodes, then between them; exchange and compute do not overlap; no stragglers",
    )
