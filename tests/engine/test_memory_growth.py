"""Rounds leave nothing behind: the memory of the process does not grow with their number."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.forward import Closure
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.workloads.models import build_model

WARM_UP, ROUNDS, K = 30, 200, 2


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def loss_of(batch: tuple[Tensor, Tensor]) -> Closure:
    return lambda module: nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize(
    "transfer",
    [
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("delta", marks=pytest.mark.slow),
        "overlap",
    ],
)
def test_two_hundred_rounds_take_no_more_memory_than_thirty(transfer: str) -> None:
    """A round that kept one of its subnets would take 200 x 0.3 MiB; the slope allowed is a tenth of it."""
    factory = partial(build_model, "offload_sparse/mlp", 4, 1, 16, stream=128, hidden=256, depth=2)
    session = SparseOffload(
        factory,
        (torch.empty(2, 1, 16, 16, device="meta"),),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        total_steps=10**6,
        policy=PolicyConfig.paper(rho=0.5),
        rounds=RoundConfig(k=K, transfer=transfer),  # type: ignore[arg-type]
        setup=Setup(verify=False),
        device="cpu",
    )
    batch = torch.randn(4, 1, 16, 16), torch.randint(4, (4,))
    sizes = []
    for _ in range(WARM_UP + ROUNDS):
        for _ in range(K):
            session.step(loss_of(batch))
        session.records()
        sizes.append(resident_bytes())
    session.transfers.close()
    y = torch.tensor(sizes[WARM_UP:], dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert slope < 0.03 * 2**20, f"{slope / 1024:.1f} KiB per round"
