"""Peak host memory of a rank against its shard, its two subnets and its activations.

``predicted`` is the shard of weights and momentum, both pairs of subnets, and what a backward pass keeps;
``peak`` is what the kernel counts above the idle process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    loss_of,
    on_ranks,
    peak_resident,
    random_batch,
    reset_peak,
    session_of,
    warm_up,
)
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.workloads.models import build_model

BATCH, RHO, STEPS = 16, 0.25, 4

_COLUMNS = ("full_model", "shard", "subnets", "activations", "predicted", "peak")


def run(quick: bool) -> BenchResult:
    """VGG-19 made wide, on one rank and on two; ``quick`` measures two ranks of a smaller network only."""
    width = 1.5 if quick else 2.6
    raw: dict[str, Any] = {}
    rows, ratios = [], {}
    for world_size in (2,) if quick else (1, 2):
        found = on_ranks(world_size, measure, width)
        for rank, figures in enumerate(found):
            raw[f"world{world_size}.rank{rank}"] = figures
            rows.append([world_size, rank, *(f"{figures[key] / 2**20:.0f} MiB" for key in _COLUMNS)])
        for against in ("predicted", "full_model"):
            ratios[f"memory.world{world_size}.peak_vs_{against}"] = max(f["peak"] / f[against] for f in found)
    return BenchResult(ratios, raw, ["ranks", "rank", *_COLUMNS], rows)


def measure(width: float) -> dict[str, int]:
    """Bytes of ``_COLUMNS`` on this rank, by training ``STEPS`` steps."""
    warm_up()
    idle = reset_peak()
    factory = partial(build_model, "offload_sparse/vgg19_cifar", num_classes=10, in_channels=3, width=width)
    rounds = RoundConfig(k=2, reference="turns", freeze_at=1.0)
    session = session_of(factory, (3, 32, 32), RHO, rounds, setup=Setup())
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = random_batch(BATCH, 32, 10, session.device, generator)
        session.step(partial(loss_of, batch=batch))
    peak = peak_resident() - idle
    shard, subnets = session.store.nbytes, session.transfers.bytes_peak
    activations = saved_bytes(session, torch.randn(BATCH, 3, 32, 32))
    full_model = 2 * 4 * session.cost.parameters(session.channel_map.full_mask())
    figures = (full_model, shard, subnets, activations, shard + subnets + activations, peak)
    return dict(zip(_COLUMNS, figures, strict=True))


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
