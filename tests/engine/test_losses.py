"""What steps measure: the means over ranks and parts of a batch, by name, in 32 bits or more."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse import Setup, SparseOffload
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.losses import StepRecord
from offload_sparse.policy.config import PolicyConfig
from tests.support.ranks import run_ranks

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def session_in(dtype: torch.dtype) -> SparseOffload:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)

    setup = Setup(dtype=dtype, verify=False)
    optimizer, rounds = partial(torch.optim.SGD, lr=0.01), RoundConfig(k=4, freeze_at=1.0)
    more: dict[str, Any] = {"policy": PolicyConfig.paper(rho=0.5), "rounds": rounds, "setup": setup}
    return SparseOffload(network, X.to(dtype), optimizer, total_steps=8, device="cpu", **more)


def measured(network: nn.Module, metrics: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
    dtype = next(network.parameters()).dtype
    return F.cross_entropy(network(X.to(dtype)).float(), Y), metrics


def in_its_own_order() -> list[StepRecord]:
    """Of a batch in two parts, on each of two ranks."""
    session, rank = session_in(torch.float32), dist.get_rank()
    parts = [{"a": 1.0, "b": 10.0 + rank}, {"b": 20.0, "a": 2.0 * rank}]
    session.step([partial(measured, metrics=metrics) for metrics in parts[:: 1 - 2 * rank]])
    return session.records()


def test_metrics_are_averaged_by_their_names() -> None:
    for records in run_ranks(2, in_its_own_order):
        assert records[0].metrics == {"a": 1.0, "b": 15.25}


def of_few_bits(dtype: torch.dtype) -> tuple[list[StepRecord], Any]:
    session = session_in(dtype)
    losses = []

    def closure(network: nn.Module) -> tuple[Tensor, dict[str, float]]:
        found = measured(network, {"tokens": 100_001.0 + dist.get_rank()})
        losses.append(found[0].item())
        return found

    session.step(closure)
    return session.records(), losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_do_not_round_what_is_measured(dtype: torch.dtype) -> None:
    ranks = run_ranks(2, of_few_bits, dtype)
    for (record,), _ in ranks:
        assert record.metrics == {"tokens": 100_001.5}
        means = [(first + second) / 2 for first, second in zip(*(losses for _, losses in ranks), strict=True)]
        assert record.compared is not None
        assert sorted(record.compared) == pytest.approx(sorted(means), rel=1e-6)


def test_gradients_whose_sum_is_beyond_float16_are_no_fault() -> None:
    """Each of them is finite, and so is the step."""
    session = session_in(torch.float16)
    session.step(lambda network: network(torch.ones(1, 12, dtype=torch.float16)).float().sum() * 20_000)
    assert [record.fault for record in session.records()] == [""]
