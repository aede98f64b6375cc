"""Small runs on random images, as the plan sees them and as a session trains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.bench.plan import CLASSES, ROUNDS, STEPS, case
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig

SMALL = case("offload_sparse/vgg_small", 16, 64, 0.25, width=2.0)
ADAMW = OptimConfig("adamw", lr=1e-3)
CASES = {
    "vgg": SMALL,
    "resnet": case("timm/resnet10t", 32, 16, 0.5, ADAMW, channels=[8, 16, 16, 32], stem_width=16),
    "mlp": case("offload_sparse/mlp", 8, 64, 0.2, stream=256, hidden=2048, depth=2),
    "every_step": replace(SMALL, round=RoundConfig(k=2, reference="every_step", freeze_at=1)),
    "one_pair": replace(SMALL, round=RoundConfig(k=2, transfer="full", freeze_at=1)),
    "local": replace(SMALL, round=RoundConfig(k=2, sync="round", outer=[1.0, 0.5], freeze_at=1)),
    "family": replace(
        case("timm/resnet10t", 16, 16, 0.1, ADAMW, channels=[8, 16, 16, 32], stem_width=16),
        policy=PolicyConfig(rho=0.1, budgets=[0.1, 0.2, 0.4], search="none"),
    ),
    "short": replace(
        SMALL,
        policy=PolicyConfig(rho=0.25, search="probe"),
        round=RoundConfig(k=2),
        train=replace(SMALL.train, max_steps=ROUNDS * STEPS),
    ),
    "depthwise": case("timm/mobilenetv1_100", 32, 16, 0.5, ADAMW),
}


def train(session: SparseOffload, config: RunConfig, after_step: Callable[[], object]) -> None:
    """``ROUNDS`` rounds of ``STEPS`` steps."""
    data, generator = config.data, torch.Generator().manual_seed(0)
    for _ in range(ROUNDS * STEPS):
        images = torch.randn(data.batch_size, 3, data.image_size, data.image_size, generator=generator)
        labels = torch.randint(CLASSES, (data.batch_size,), generator=generator)
        session.step(partial(loss_fn, batch=(images, labels)))
        after_step()


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])
