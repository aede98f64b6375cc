"""An evaluation leaves no trace in the training, whatever the network does in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse import Forward, Setup, SparseOffload
from offload_sparse.engine.config import RoundConfig
from offload_sparse.policy.config import PolicyConfig

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = 12


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def closure(number: int) -> Callable[[nn.Module], Tensor]:
    x, y = batch(number)
    return lambda net: F.cross_entropy(net(x), y)


class Network(nn.Module):
    """Counts its passes in ways that networks have: in place, by assignment, in a table that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=None)
        self.second, self.last = nn.Linear(16, 12), nn.Linear(12, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("table", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.assigned = self.assigned + 1
        if len(x) > len(self.table):
            self.table = torch.zeros(len(x))
        if not self.training:
            self.register_buffer("cache", torch.ones(1))
        return self.last(F.relu(self.second(F.relu(self.norm(self.first(x))))))


def new_session(model: Callable[[], nn.Module] = Network, **more: Any) -> SparseOffload:
    torch.manual_seed(0)
    given = {"rho": 0.5, "total_steps": STEPS, "device": "cpu", "rounds": RoundConfig(k=4, freeze_at=0.5)}
    return SparseOffload(model, batch(0)[0], SGD, **(given | more))


def trained(session: SparseOffload, evaluated_at: frozenset[int] = frozenset()) -> SparseOffload:
    for step in range(STEPS):
        if step in evaluated_at:
            with session.evaluation() as network:
                network(torch.randn(64, 8))
        session.step(closure(step))
    return session


def state_of(session: SparseOffload) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[prefix] = value
        for name, part in value.items() if isinstance(value, dict) else ():
            collect(f"{prefix}/{name}", part)

    collect("", session.state_dict())
    assert len(found) > 10
    return found


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_buffers_and_weights_are_those_of_a_run_without_it(ema: float) -> None:
    expected = state_of(trained(new_session(ema=ema)))
    found = state_of(trained(new_session(ema=ema), frozenset({3, 6, 9})))
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not wrong


@cache
def final_masks(evaluated_at: frozenset[int]) -> list[Tensor | None]:
    policy = PolicyConfig(rho=0.5, sampler="bernoulli")
    sessions = (new_session(policy=policy, rho=None, seed=seed) for seed in range(3))
    return [trained(session, evaluated_at).final_mask for session in sessions]


@pytest.mark.parametrize("at", [4, 6, 8])
def test_the_final_mask_is_the_same_with_and_without_it(at: int) -> None:
    """It begins the round, so that the mask is chosen before the next batch is known."""
    for expected, found in zip(final_masks(frozenset()), final_masks(frozenset({at})), strict=True):
        assert expected is not None
        assert found is not None
        assert torch.equal(found, expected)


def test_nothing_that_reads_the_training_works_inside() -> None:
    session = new_session(ema=0.5)
    session.step(closure(0))
    load = partial(session.load_state_dict, session.state_dict())
    with session.evaluation():
        step, evaluation = partial(session.step, closure(1)), session.evaluation().__enter__
        for ask in (step, evaluation, load, session.state_dict, session.settle, session.finalize):
            with pytest.raises(ValueError, match="leave its with block first"):
                ask()
    session.state_dict()
    session.step(closure(1))


def test_an_autocast_of_the_loop_does_not_blind_a_probe() -> None:
    """Autocast keeps the casts of weights; those of each pass of a probe are others."""
    policy = PolicyConfig(rho=0.5, search="probe")
    rounds = RoundConfig(k=5, freeze_at=0.5)
    moved = []
    for around, inside in ((False, True), (True, False)):
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        forward = Forward(autocast) if inside else Forward()
        widths = [nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)]
        settings = {"policy": policy, "rho": None, "rounds": rounds, "total_steps": 1600, "forward": forward}
        session = new_session(partial(nn.Sequential, *widths), setup=Setup(block=1), **settings)
        with autocast(enabled=around):
            for step in range(4):
                session.step(closure(step))
            session._probe()
        moved.append(session.policy.report()["probes"])
    assert moved[0] == moved[1]


def test_statistics_are_estimated_under_the_autocast_of_training() -> None:
    """Batches in the type of autocast would not meet weights of another."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    session = new_session(model, forward=Forward(partial(torch.autocast, "cpu", torch.bfloat16)))
    x, y = batch(0)
    for _ in range(STEPS):
        session.step(lambda net: F.cross_entropy(net(x.bfloat16()).float(), y))
    with session.evaluation():
        pass
    session.finalize([x.bfloat16()])


def test_a_loss_may_differentiate_by_itself() -> None:
    """A penalty of the gradient, in references and re-estimations too; ``backward`` stays refused."""

    def penalised(net: nn.Module) -> Tensor:
        x = batch(0)[0].requires_grad_()
        out = net(x).square().sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=torch.is_grad_enabled())
        return out + gradient.square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    session = new_session(model)
    for _ in range(STEPS):
        loss = session.step(penalised)
    assert loss.isfinite()
    session.finalize()


def test_batches_may_be_mappings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return self.layers(given["x"])

    x, y = batch(0)
    session = SparseOffload(Named, ({"x": x},), SGD, rho=0.5, total_steps=4, device="cpu")  # type: ignore[arg-type]
    session.step(lambda net: F.cross_entropy(net({"x": x}), y))
    with session.evaluation([{"x": x}]) as network:
        assert network({"x": x}).shape == (16, 3)
