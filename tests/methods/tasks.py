"""Small tasks for methods: a network with BatchNorm on random images, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.config.run import RunConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.method import Task
from offload_sparse.methods.weight_masks.masked import MaskedTraining

Batch = tuple[Tensor, Tensor]


def small_net() -> nn.Sequential:
    """Two convolutions, one with BatchNorm, and two Linear layers, for images float64[b, 2, 8, 8]."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def loss_fn(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1]), {"accuracy": (logits.argmax(1) == batch[1]).double().mean()}


def batches(count: int, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 2, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def make_task(config: RunConfig, total_steps: int = 20, frozen_batch_norm: bool = False) -> Task:
    return Task(
        config,
        small_net,
        (torch.empty(1, 2, 8, 8, device="meta"),),
        loss_fn,
        total_steps,
        torch.device("cpu"),
        torch.float64,
        Forward(frozen_batch_norm=frozen_batch_norm),
    )


def make_method(config: RunConfig, **options: Any) -> MaskedTraining:
    method = build_method(make_task(config, **options))
    assert isinstance(method, MaskedTraining)
    return method


def train(method: MaskedTraining, data: list[Batch], lr: float = 0.05) -> list[float]:
    """One step per batch; the losses."""
    for batch in data:
        method.train_step(batch, lr)
    return [record.loss for record in method.records()]
