"""A family in training: the sandwich of three networks narrowed by hand, whose norms are their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.sparse_offload import SparseOffloadMethod
from offload_sparse.policy.config import PolicyConfig
from tests.methods.tasks import batches, make_task
from tests.support.ranks import run_ranks
from tests.support.sessions import own_part

SHARES = [0.3, 0.5, 0.9]
STEPS, LR = 10, 0.05
OPTIM = OptimConfig(lr=LR, momentum=0.9, weight_decay=1e-2)
DATA = batches(STEPS)
NORM, SLOT = ("1.weight", "1.bias"), "momentum_buffer"


def method_of(policy: PolicyConfig, **task: Any) -> SparseOffloadMethod:
    rounds = RoundConfig(k=4, freeze_at=0.4)
    config = RunConfig(run_dir=Path("unused"), policy=policy, round=rounds, optim=OPTIM)
    method = build_method(make_task(config, **({"total_steps": STEPS} | task)))
    assert isinstance(method, SparseOffloadMethod)
    return method


def family(**task: Any) -> SparseOffloadMethod:
    return method_of(PolicyConfig(rho=0.3, budgets=SHARES, search="none"), **task)


def trained(method: SparseOffloadMethod, first: int = 0, last: int = STEPS) -> SparseOffloadMethod:
    for batch in DATA[first:last]:
        method.train_step(own_part(batch), LR)
    return method


def networks(method: SparseOffloadMethod) -> list[dict[str, Tensor]]:
    """The tensors of every member, the smallest first."""
    network = method.finalize([DATA[0][0]])
    every = [*network.members.values(), network]
    return [{n: t.detach().clone() for n, t in each.module.state_dict().items()} for each in every]


def narrow(first: int, second: int, third: int) -> nn.Sequential:
    """The network of ``make_task`` with so many channels."""
    return nn.Sequential(
        *(nn.Conv2d(2, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * second, third), nn.ReLU(), nn.Linear(third, 3)),
    ).double()


class Sandwich:
    """Three narrow networks by hand: they read one set of full weights, and have norms of their own."""

    def __init__(self, method: SparseOffloadMethod) -> None:
        full = {n: p.detach().double() for n, p in make_task(RunConfig()).network().named_parameters()}
        seeded = method.session.store
        assert all(torch.equal(seeded.own_rows(n), value) for n, value in full.items()), "the same start"
        self.kept = [
            [mask[g.start : g.stop].nonzero().flatten() for g in method.channel_map.groups]
            for mask in method.session.policy.family()  # type: ignore[union-attr]
        ]
        self.full = {n: nn.Parameter(value) for n, value in full.items() if n not in NORM}
        self.norms = [
            {n: nn.Parameter(full[n][first].clone()) for n in NORM} for first, _, _ in self.kept
        ]
        self.networks = [narrow(*map(len, kept)).train() for kept in self.kept]
        own = [parameter for norms in self.norms for parameter in norms.values()]
        self.optimizer = torch.optim.SGD(
            [*self.full.values(), *own], LR, OPTIM.momentum, weight_decay=OPTIM.weight_decay
        )

    def tensors(self, number: int) -> dict[str, Tensor]:
        first, second, third = self.kept[number]
        columns = (4 * second[:, None] + torch.arange(4)).flatten()
        w = self.full
        return self.norms[number] | {
            "0.weight": w["0.weight"][first],
            "0.bias": w["0.bias"][first],
            "4.weight": w["4.weight"][second][:, first],
            "4.bias": w["4.bias"][second],
            "7.weight": w["7.weight"][third][:, columns],
            "7.bias": w["7.bias"][third],
            "9.weight": w["9.weight"][:, third],
            "9.bias": w["9.bias"],
        }

    def step(self, x: Tensor, y: Tensor) -> None:
        said = (functional_call(network, self.tensors(n), (x,)) for n, network in enumerate(self.networks))
        self.optimizer.zero_grad(set_to_none=False)
        (sum(F.cross_entropy(logits, y) for logits in said) / 3).backward()
        self.optimizer.step()


def test_training_equals_a_sandwich_of_three_networks_narrowed_by_hand() -> None:
    method = family()
    sandwich = Sandwich(method)
    for batch in DATA:
        sandwich.step(*batch)
    found = networks(trained(method))
    for number, tensors in enumerate(found):
        for name, expected in sandwich.tensors(number).items():
            torch.testing.assert_close(tensors[name], expected.detach(), rtol=1e-10, atol=1e-10)
    small, large = found[0][NORM[0]], found[-1][NORM[0]]
    inside = torch.isin(sandwich.kept[-1][0], sandwich.kept[0][0])
    assert not torch.allclose(small, large[inside], rtol=1e-4)


def whole_state(cut: int) -> dict[str, Any]:
    return trained(family(frozen_batch_norm=True), 0, cut).session.state_dict()


def rest(state: dict[str, Any], cut: int) -> list[dict[str, Tensor]]:
    method = family(frozen_batch_norm=True)
    method.session.load_state_dict(state)
    again = method.session.state_dict()
    if "rows" in state and not dist.is_initialized():
        assert all(torch.equal(again["rows"][name], value) for name, value in state["rows"].items())
    return networks(trained(method, cut))


def on_ranks() -> list[dict[str, Tensor]]:
    return networks(trained(family(frozen_batch_norm=True)))


def test_two_ranks_train_the_family_of_one_which_can_go_on_with_it() -> None:
    """Statistics stand still, since each rank would have those of its own part of a batch."""
    alone = on_ranks()
    together = run_ranks(2, on_ranks)
    [state, _] = run_ranks(2, whole_state, 6)
    assert any(NORM[0] in name and name != f"weights/{NORM[0]}" for name in state["rows"])
    for found in (*together, rest(state, 6)):
        for mine, theirs in zip(alone, found, strict=True):
            for name, value in mine.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(*together, strict=True) for n in a)


def test_own_norms_start_from_what_the_search_has_left() -> None:
    """Values and slots; until then they are 0, whatever the weight decay."""
    method = trained(method_of(PolicyConfig(rho=0.3, budgets=SHARES, search="probe")), 0, 4)
    session = method.session
    session.settle()
    own = {kind: session.store.own_rows(f"{NORM[0]}_of_member_1", kind) for kind in ("weights", SLOT)}
    shared = {kind: session.store.own_rows(NORM[0], kind) for kind in own}
    assert not any(bool(values.any()) for values in own.values())
    with session.evaluation([DATA[0][0]]):
        assert session.frozen
    inside = session.final_mask[: len(shared[SLOT])]  # type: ignore[index]
    for kind, values in own.items():
        assert bool(shared[kind][inside].any())
        assert torch.equal(values[inside], shared[kind][inside]), kind


def test_members_may_grow_from_the_whole_network() -> None:
    """With rho 1 the search has the full network, the largest member need not be it."""
    method = method_of(PolicyConfig(rho=1.0, budgets=[0.25, 0.5], search="none"))
    small, large = networks(trained(method, 0, 3))
    assert len(small[NORM[0]]) < len(large[NORM[0]]) < 6
