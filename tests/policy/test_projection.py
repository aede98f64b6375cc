"""The projection onto the box and the budget is the optimum of its quadratic program."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

from offload_sparse.policy import budget as budgets

TIGHT = 1e-10


def project(
    z: Tensor, budget: float, lower: float = 0.0, upper: float = 1.0, cost: Tensor | None = None
) -> Tensor:
    unit = 1.0 if cost is None else cost.numpy()
    return torch.from_numpy(budgets.project(z.numpy(), budget, lower, upper, unit))


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn, unit_cost: bool = False) -> tuple[Tensor, float, float, float, Tensor]:
    """(z, budget, lower, upper, cost) with at least one feasible point."""
    size = draw(st.integers(1, 30))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 1e6]))
    floats = st.floats(-1.0, 1.0, allow_subnormal=False)
    z = scale * vector(draw(st.lists(floats, min_size=size, max_size=size)))
    lower = draw(st.sampled_from([0.0, 0.005, 0.2]))
    upper = draw(st.sampled_from([1.0, 0.995, 0.6]))
    costs = st.floats(0.01, 10.0)
    cost = torch.ones_like(z) if unit_cost else vector(draw(st.lists(costs, min_size=size, max_size=size)))
    share = draw(st.just(0.0) | st.floats(1e-6, 1.2))  # less than 1e-6 of a channel is rounding
    budget = float(cost.sum()) * (lower + share * (upper - lower))
    return z, budget, lower, upper, cost


def by_bisection(z: Tensor, budget: float, lower: float, upper: float, cost: Tensor) -> Tensor:
    """Reference: bisection on the multiplier of the KKT conditions, on (0, max((z - lower) / cost)]."""
    if float((cost * z.clamp(lower, upper)).sum()) <= budget:
        return z.clamp(lower, upper)
    low, high = 0.0, float(((z - lower) / cost).max()) + 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        spent = float((cost * (z - middle * cost).clamp(lower, upper)).sum())
        low, high = (middle, high) if spent > budget else (low, middle)
    return (z - high * cost).clamp(lower, upper)


@given(problems())
def test_the_result_is_feasible(problem: tuple[Tensor, float, float, float, Tensor]) -> None:
    z, budget, lower, upper, cost = problem
    s = project(z, budget, lower, upper, cost)
    assert float(s.min()) >= lower
    assert float(s.max()) <= upper
    assert float((cost * s).sum()) <= budget + TIGHT * float(cost.sum())


@given(problems())
def test_projecting_twice_changes_no_bit(problem: tuple[Tensor, float, float, float, Tensor]) -> None:
    z, budget, lower, upper, cost = problem
    once = project(z, budget, lower, upper, cost)
    assert torch.equal(project(once, budget, lower, upper, cost), once)


@given(problems(unit_cost=True))
def test_the_order_of_the_entries_is_kept(problem: tuple[Tensor, float, float, float, Tensor]) -> None:
    z, budget, lower, upper, _ = problem
    s = project(z, budget, lower, upper)
    assert bool((s[z.argsort()].diff() >= 0).all())


@given(problems())
def test_the_result_equals_that_of_bisection(problem: tuple[Tensor, float, float, float, Tensor]) -> None:
    z, budget, lower, upper, cost = problem
    expected = by_bisection(z, budget, lower, upper, cost)
    tolerance = 1e-10 * max(1.0, float(z.abs().max()))
    torch.testing.assert_close(project(z, budget, lower, upper, cost), expected, rtol=0, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_scipys_constrained_solver_finds_no_better_point(
    problem: tuple[Tensor, float, float, float, Tensor],
) -> None:
    z, budget, lower, upper, cost = problem
    z = z.clamp(-10, 10)
    s = project(z, budget, lower, upper, cost)
    found = optimize.minimize(
        lambda y: 0.5 * ((y - z.numpy()) ** 2).sum(),
        torch.full_like(z, lower).numpy(),
        jac=lambda y: y - z.numpy(),
        bounds=[(lower, upper)] * len(z),
        constraints={
            "type": "ineq",
            "fun": lambda y: budget - cost.numpy() @ y,
            "jac": lambda y: -cost.numpy(),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    if found.success:
        distance = 0.5 * float(((s - z) ** 2).sum())
        assert distance <= found.fun + 1e-7 * (1 + found.fun)


def test_a_feasible_point_is_only_clipped() -> None:
    z = vector([-0.5, 0.25, 1.5])
    assert torch.equal(project(z, 2.0), vector([0.0, 0.25, 1.0]))


def test_the_budget_is_spent_when_it_binds() -> None:
    s = project(vector([0.9, 0.5, 0.1]), 0.75)
    torch.testing.assert_close(s, vector([0.575, 0.175, 0.0]), rtol=0, atol=1e-15)


def test_dear_atoms_pay_more_of_an_overspent_budget() -> None:
    s = project(vector([0.5, 0.5]), 1.0, cost=vector([1.0, 3.0]))
    torch.testing.assert_close(s, vector([0.4, 0.2]), rtol=0, atol=1e-15)


def test_an_atom_without_cost_is_only_clipped() -> None:
    s = project(vector([2.0, 0.9, 0.9]), 1.0, cost=vector([0.0, 1.0, 1.0]))
    torch.testing.assert_close(s, vector([1.0, 0.5, 0.5]), rtol=0, atol=1e-15)


def test_a_budget_equal_to_the_lower_bound_gives_the_lower_bound() -> None:
    assert torch.equal(project(vector([0.9] * 7), 0.1 * 7, lower=0.1), vector([0.1] * 7))


def test_a_budget_below_the_lower_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="raise the budget or lower the bound"):
        project(vector([0.5, 0.5]), 0.1, lower=0.2)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        project(vector([0.1, float("nan")]), 1.0)
