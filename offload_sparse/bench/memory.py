"""Peak host memory of a rank against its shard, its two subnets and its activations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.ranks import run_ranks
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.workloads.models import build_model

BATCH = 16
RHO = 0.25
STEPS = 4


def run(quick: bool) -> BenchResult:
    """VGG-19 made wide, on one rank and on two; ``quick`` measures two ranks of a smaller network only."""
    width = 1.5 if quick else 2.6
    raw: dict[str, Any] = {}
    rows, ratios = [], {}
    for world_size in (2,) if quick else (1, 2):
        for rank, figures in enumerate(run_ranks(world_size, measure, width, limit=600.0)):
            raw[f"world{world_size}.rank{rank}"] = figures
            rows.append([world_size, rank, *(f"{figures[key] / 2**20:.0f} MiB" for key in _COLUMNS)])
        peaks = [f for name, f in raw.items() if name.startswith(f"world{world_size}.")]
        ratios[f"memory.world{world_size}.peak_vs_predicted"] = max(f["peak"] / f["predicted"] for f in peaks)
        ratios[f"memory.world{world_size}.peak_vs_full_model"] = max(
            f["peak"] / f["full_model"] for f in peaks
        )
    return BenchResult(ratios, raw, ["ranks", "rank", *_COLUMNS], rows)


_COLUMNS = ("full_model", "shard", "subnets", "activations", "predicted", "peak")


def measure(width: float) -> dict[str, int]:
    """Train ``STEPS`` steps on this rank.

    Returns:
        bytes: the full weights and momentum, this rank's shard, both subnets, the activations that a backward
            pass keeps, their sum
        (``predicted``, without the full model), and the peak above the idle process.
    """
    warm_up()
    reset_peak()
    idle = peak_resident()
    factory = partial(build_model, "offload_sparse/vgg19_cifar", num_classes=10, in_channels=3, width=width)
    session = SparseOffload(
        factory,
        (torch.empty(1, 3, 32, 32, device="meta"),),
        total_steps=10 * STEPS,
        policy=PolicyConfig.paper(rho=RHO),
        rounds=RoundConfig(k=2, reference="turns", freeze_at=1.0),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        session.step((images, torch.randint(10, (BATCH,), generator=generator)), loss_fn)
    peak = peak_resident() - idle
    shard, subnets = session.store.nbytes, session.relay.bytes_peak
    activations = saved_bytes(session, torch.randn(BATCH, 3, 32, 32))
    full_model = 2 * 4 * session.cost.parameters(session.channel_map.full_mask())
    return {
        "full_model": full_model,
        "shard": shard,
        "subnets": subnets,
        "activations": activations,
        "predicted": shard + subnets + activations,
        "peak": peak,
    }


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def saved_bytes(session: SparseOffload, images: Tensor) -> int:
    """Bytes of the distinct storages that the backward pass of a subnet keeps, its weights left out."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with session.evaluation([images]) as module:
        session.forward.train_mode(module)
        own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            graph = module(images)
        del graph
    return sum(size for address, size in saved.items() if address not in own)


def warm_up() -> None:
    """Load what a training process needs however small its model is, so that it counts as idle."""
    from offload_sparse.store.copy import host_copy

    host_copy.load()
    small = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, fused=True)
    small(torch.randn(2, 8)).sum().backward()
    optimizer.step()


def reset_peak() -> None:
    """Make the kernel forget this process's peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Largest resident memory of this process since ``reset_peak``, in bytes."""
    return _status("VmHWM")


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this bench needs Linux")
