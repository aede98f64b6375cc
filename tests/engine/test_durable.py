"""A session on a store in files, stopped after any round, goes on to the result of one that was not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.durable import DurableRounds
from offload_sparse.engine.forward import Closure
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import StoreConfig

K, ROUNDS = 2, 4


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def session_of(folder: Path, mode: str = "new", tier: str = "file", **more: Any) -> SparseOffload:
    return SparseOffload(
        network,
        (torch.empty(2, 6),),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        total_steps=K * ROUNDS,
        policy=PolicyConfig.paper(rho=0.5, lr=0.05),
        rounds=RoundConfig(k=K, freeze_at=1),
        setup=Setup(
            store=StoreConfig(tier, str(folder)),  # type: ignore[arg-type]
            run_id="test",
            store_mode=mode,  # type: ignore[arg-type]
            verify=False,
        ),
        device="cpu",
        **more,
    )


def test_other_groups_need_a_store_of_their_own_or_replace_it(tmp_path: Path) -> None:
    session_of(tmp_path)
    groups = lambda name: {"lr": 0.01} if name == "0.bias" else None  # noqa: E731
    with pytest.raises(ValueError, match="channel map"):
        session_of(tmp_path, "resume", groups=groups)
    session_of(tmp_path, "replace", groups=groups)
    session_of(tmp_path, "resume", groups=groups)


def loss_of(batch: tuple[Tensor, Tensor]) -> Closure:
    return lambda module: F.cross_entropy(module(batch[0]), batch[1])


def train(session: SparseOffload, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        losses.append(float(session.step(loss_of(batch))))
    return losses


@pytest.mark.parametrize("stopped", [1, 2, 5, 6])
def test_a_resumed_session_is_bit_equal_to_one_that_never_stopped(tmp_path: Path, stopped: int) -> None:
    whole = session_of(tmp_path / "whole")
    DurableRounds(whole)
    losses = train(whole, 0, K * ROUNDS)
    first = session_of(tmp_path / "parts")
    DurableRounds(first, settle_every=1)
    train(first, 0, stopped)
    second = session_of(tmp_path / "parts", "resume")
    done = DurableRounds(second, settle_every=1).restore()
    assert done == stopped - stopped % K
    assert train(second, done, K * ROUNDS) == losses[done:]
    assert torch.equal(second.policy.s, whole.policy.s)
    whole.settle()
    second.settle()
    for kind, array in whole.store.arrays.items():
        assert torch.equal(second.store.arrays[kind], array)
    assert (second.rounds_done, second.forward_flops) == (whole.rounds_done, whole.forward_flops)


def test_files_and_memory_train_the_same(tmp_path: Path) -> None:
    assert train(session_of(tmp_path), 0, 4) == train(session_of(tmp_path, tier="ram"), 0, 4)


def test_a_store_in_memory_cannot_be_durable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set store\.tier file"):
        DurableRounds(session_of(tmp_path, tier="ram"))
    with pytest.raises(ValueError, match="settle_every is 0"):
        DurableRounds(session_of(tmp_path / "x"), settle_every=0)
