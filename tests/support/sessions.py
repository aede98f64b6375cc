"""Small sessions in float64, the batches that they train on, and what is left of them."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.forward import Closure, Forward
from offload_sparse.engine.optimizer import Grouping, OptimizerFactory, optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.weight_store import WeightStore
from tests.support.channel_maps import SmallNet, small_map
from tests.support.constants import configured

OPTIM = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2)


def batches(steps: int, seed: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def loss_of(batch: tuple[Tensor, Tensor]) -> Closure:
    """The closure of a step on ``batch``."""
    return partial(loss_fn, batch=batch)


def small_net(batch_norm: bool = True) -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return SmallNet(batch_norm=batch_norm).double()


def make_session(
    net: nn.Module,
    policy: PolicyConfig,
    rounds: RoundConfig,
    total: int = 10**6,
    optimizer: OptimConfig | OptimizerFactory = OPTIM,
    channel_map: ChannelMap | None = None,
    forward: Forward | None = None,
    groups: Grouping | None = None,
    ema: float = 0.0,
    device: torch.device | str = "cpu",
    **setup: object,
) -> SparseOffload:
    """A session, in float64 unless ``setup``, as in ``Setup``, has another ``dtype``. The map of a
    ``SmallNet`` is checked once, in ``tests/channels/test_verify.py``, and not in each session.
    """
    ours = isinstance(optimizer, OptimConfig)
    found = small_map(net) if channel_map is None and isinstance(net, SmallNet) else channel_map
    known = channel_map is None and type(net) is SmallNet
    setup = {"dtype": torch.float64, "verify": not known} | setup
    return SparseOffload(
        net,
        (torch.empty(2, 2, 6, 6, device="meta", dtype=torch.float64),),
        optimizer_factory(optimizer) if isinstance(optimizer, OptimConfig) else optimizer,
        total_steps=total,
        groups=groups,
        clip_norm=optimizer.clip_norm if ours else 0.0,  # type: ignore[union-attr]
        ema=ema,
        forward=forward,
        policy=policy,
        rounds=rounds,
        setup=Setup(channel_map=found, **setup),  # type: ignore[arg-type]
        seed=3,
        device=device,
    )


def stored(session: SparseOffload, kind: str) -> dict[str, Tensor]:
    session.settle()
    store = session.store
    return {n: store.own_rows(n, kind) for n in store.partitions[kind].layout.shapes}


def arrays(session: SparseOffload) -> dict[str, Tensor]:
    session.settle()
    return {kind: array.clone() for kind, array in session.store.arrays.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All of ``expected`` is in ``found``, bit for bit."""
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def own_part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This rank's contiguous part of a global batch."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size = len(batch[0]) // world_size
    part = slice(rank * size, (rank + 1) * size)
    return batch[0][part], batch[1][part]


def whole(store: WeightStore, kind: str) -> Tensor:
    """The full flat array of ``kind``, assembled on every rank."""
    selection = Selection(store.channel_map, store.channel_map.full_mask())
    out = torch.empty(store.partitions[kind].layout.size, dtype=store.dtype)
    store.gather(selection, kind, out)
    return out


def redrawing(refresh: float, policy: PolicyConfig) -> PolicyConfig:
    """The same policy with another share of atoms that are redrawn."""
    return configured(PolicyConfig, refresh=refresh, **vars(policy))


POLICIES = {
    "pge": PolicyConfig.paper(rho=0.5, estimator="pge", lr=0.05),
    "disarm_cv": PolicyConfig.paper(rho=0.5, estimator="disarm_cv", lr=0.05),
    "persistent": redrawing(0.3, PolicyConfig.paper(rho=0.5, sampler="persistent", lr=0.05)),
    "fixed_width": PolicyConfig.paper(rho=0.5, sampler="fixed_width", estimator="vr_pge", lr=0.05),
    "flops": PolicyConfig.paper(rho=0.4, budget="flops", lr=0.05),
    "params": PolicyConfig.paper(rho=0.4, budget="params", lr=0.05),
    "default": redrawing(0.5, PolicyConfig(rho=0.5, lr=0.5)),
}
"""One for every estimator, sampler, budget and parametrisation beyond the paper's."""
