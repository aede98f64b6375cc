"""On a GPU the engine does what it does on the CPU. Written without a GPU at hand: not yet run on one."""

from __future__ import annotations

import pytest
import torch

from offload_sparse.engine.config import RoundConfig
from offload_sparse.policy.config import PolicyConfig
from tests.support.sessions import batches, loss_of, make_session, small_net

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_rounds_on_the_gpu_equal_rounds_on_the_cpu() -> None:
    sessions = [
        make_session(small_net(), PolicyConfig(rho=0.5), RoundConfig(k=3), device=torch.device(name))
        for name in ("cpu", "cuda")
    ]
    for x, y in batches(9):
        for session in sessions:
            session.step(loss_of((x.to(session.device), y.to(session.device))))
    for session in sessions:
        session.settle()
    for kind, expected in sessions[0].store.arrays.items():
        torch.testing.assert_close(sessions[1].store.arrays[kind], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(sessions[1].policy.s, sessions[0].policy.s, rtol=1e-8, atol=1e-10)


def test_the_store_is_page_locked() -> None:
    session = make_session(small_net(), PolicyConfig(rho=0.5), RoundConfig(k=3), device=torch.device("cuda"))
    assert all(array.is_pinned() for array in session.store.arrays.values())
