"""RigL: densities that spend the budget, a cosine of replacements, and counts that stay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sparse.config.run import RunConfig
from offload_sparse.methods.weight_masks import rigl
from offload_sparse.methods.weight_masks.rigl import DropAndGrow, erk_densities, update_fraction
from offload_sparse.policy.config import PolicyConfig
from tests.methods.tasks import batches, make_method, train

shape = st.one_of(
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.just(3), st.just(3)),
)


@given(shapes=st.lists(shape, min_size=1, max_size=6), density=st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_erk_densities_spend_the_budget_and_stay_within_one(
    shapes: list[tuple[int, ...]], density: float
) -> None:
    densities = erk_densities(shapes, density)
    sizes = [math.prod(s) for s in shapes]
    spent = sum(d * size for d, size in zip(densities, sizes, strict=True))
    assert spent == pytest.approx(density * sum(sizes))
    assert all(0 < d <= 1 + 1e-9 for d in densities)


def test_erk_densities_fall_with_the_size_of_a_layer() -> None:
    small, large = erk_densities([(10, 10), (100, 100)], 0.05)
    assert small / large == pytest.approx((20 / 100) / (200 / 10_000))


def test_the_share_replaced_is_a_cosine_that_ends_at_zero() -> None:
    assert update_fraction(0, 0.3, 100) == 0.3
    assert update_fraction(50, 0.3, 100) == pytest.approx(0.15)
    assert update_fraction(100, 0.3, 100) == pytest.approx(0)
    assert update_fraction(500, 0.3, 100) == pytest.approx(0)


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigl, "INTERVAL", 1)
    monkeypatch.setattr(rigl, "FRACTION", 0.6)


@pytest.mark.usefixtures("_often")
def test_a_replacement_drops_small_weights_and_grows_others() -> None:
    """It drops the smallest weights and grows where the gradient is largest."""
    weight = torch.nn.Parameter(torch.zeros(1, 8))
    sparsity = DropAndGrow({"weight": weight}, 0.5, total_steps=1000, seed=0)
    alive = sparsity.masks()["weight"].flatten().nonzero().flatten()
    dead = (~sparsity.masks()["weight"]).flatten().nonzero().flatten()
    with torch.no_grad():
        weight.view(-1)[alive] = torch.tensor([0.1, -3.0, 2.0, -0.2])
    gradient = torch.zeros(1, 8)
    gradient[0, dead] = torch.tensor([5.0, 1.0, -6.0, 2.0])
    gradient[0, alive[1:3]] = 100.0
    weight.grad = gradient
    assert not sparsity.amend_gradients(1, torch.optim.SGD([weight]))
    kept = set(sparsity.masks()["weight"].flatten().nonzero().flatten().tolist())
    assert kept == {*alive[1:3].tolist(), int(dead[0]), int(dead[2])}
    assert (weight != 0).flatten().nonzero().flatten().tolist() == alive[1:3].tolist()


@pytest.mark.usefixtures("_often")
def test_a_dropped_weight_with_a_large_gradient_returns_as_it_was() -> None:
    """Algorithm 1 grows from all weights but those that stay; in a dense layer from those just dropped."""
    for density in (0.5, 1.0):
        weight = torch.nn.Parameter(torch.zeros(1, 8))
        sparsity = DropAndGrow({"weight": weight}, density, total_steps=1000, seed=0)
        mask = sparsity.masks()["weight"]
        first = mask.flatten().nonzero().flatten()[0]
        with torch.no_grad():
            weight[mask] = torch.linspace(0.1, 1, int(mask.sum()))
        weight.grad = torch.linspace(0.3, 0.4, 8)[None] * ~mask
        weight.grad[0, first] = 9.0
        assert not sparsity.amend_gradients(1, torch.optim.SGD([weight]))
        found = sparsity.masks()["weight"]
        assert int(found.sum()) == int(mask.sum())
        assert found[0, first]
        assert float(weight.detach()[0, first]) == pytest.approx(0.1)


def test_counts_stay_and_nothing_lives_outside_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigl, "INTERVAL", 2)
    config = RunConfig(method="rigl", policy=PolicyConfig(rho=0.3))
    method = make_method(config, total_steps=16)
    seen = [method.sparsity.masks()]
    for batch in batches(16):
        train(method, [batch])
        masks = method.sparsity.masks()
        seen.append(masks)
        for (name, mask), first in zip(masks.items(), seen[0].values(), strict=True):
            weight = method.sparsity.weights[name]
            assert int(mask.sum()) == int(first.sum())
            assert not weight[~mask].any()
            for slot in method._optimizer.state[weight].values():
                assert not slot[~mask].any()
    changes = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(seen)]
    assert [step for step, changed in enumerate(changes) if changed] == [2, 4, 6, 8, 10]
    total = sum(m.numel() for m in seen[0].values())
    assert sum(int(m.sum()) for m in seen[0].values()) / total == pytest.approx(0.3, abs=0.01)


def test_ranks_and_restarts_draw_the_same_first_masks() -> None:
    first, second, other = (
        make_method(RunConfig(method="rigl")).sparsity.masks() if seed is None else _masks_of(seed)
        for seed in (None, 0, 1)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def _masks_of(seed: int) -> dict[str, torch.Tensor]:
    config = RunConfig(method="rigl")
    config.train.seed = seed
    return make_method(config).sparsity.masks()
