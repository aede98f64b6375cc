"""A compiled session trains what an eager one does; with fixed widths it compiles in its first round only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from offload_sparse.engine.config import FinalConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from tests.support.sessions import arrays, batches, loss_of, make_session, small_net

ROUNDS = RoundConfig(k=4, freeze_at=0.75)


@pytest.fixture(autouse=True)
def _trace_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything but the generation of code, which takes minutes and decides nothing here."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(compile: bool, policy: PolicyConfig, steps: int = 16) -> tuple[SparseOffload, list[int]]:
    """A session after its last step, and the graphs compiled by the end of every round."""
    session = make_session(
        small_net(), policy, ROUNDS, steps, compile=compile, final=FinalConfig(candidates=2)
    )
    graphs = []
    for step, batch in enumerate(batches(steps)):
        session.step(loss_of(batch))
        if step % ROUNDS.k == ROUNDS.k - 1:
            graphs.append(counters["stats"]["unique_graphs"])
    return session, graphs


def test_a_compiled_run_compiles_only_in_its_first_round() -> None:
    """Its widths stay fixed."""
    session, graphs = trained(True, PolicyConfig(rho=0.5, lr=0.05))
    assert session.policy.config.sampler == "fixed_width"
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], "masks, subnets and even the final network change, shapes do not"
    assert session.frozen
    eager, none = trained(False, PolicyConfig(rho=0.5, lr=0.05, sampler="fixed_width"))
    assert none[-1] == graphs[-1]
    torch.testing.assert_close(session.policy.s, eager.policy.s, rtol=1e-9, atol=1e-11)
    for kind, array in arrays(eager).items():
        torch.testing.assert_close(arrays(session)[kind], array, rtol=1e-9, atol=1e-11, msg=kind)


def test_widths_that_vary_compile_again() -> None:
    _, graphs = trained(True, PolicyConfig(rho=0.5, sampler="bernoulli"))
    assert graphs[-1] > graphs[0]
