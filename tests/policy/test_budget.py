"""Budgets of atoms, parameters and FLOPs: met by what is learned, and by the masks that a run ends with."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.policy.budget import Budget, evenly_narrowed, project
from offload_sparse.policy.config import BudgetName, PolicyConfig
from offload_sparse.policy.width_search import WidthSearch
from tests.support.channel_maps import SmallNet, small_map

INPUTS = (torch.empty(1, 2, 6, 6, device="meta"),)
BOUNDS = (0.005, 0.995)
NONLINEAR: list[BudgetName] = ["params", "flops"]


def costs_of(*widths: int) -> tuple[CostModel, SmallNet]:
    net = SmallNet(widths=widths)  # type: ignore[arg-type]
    return CostModel(net, small_map(net), INPUTS), net


WIDE, WIDE_NET = costs_of(48, 64)
GROUPS = small_map(WIDE_NET).groups


def budget_of(kind: BudgetName, rho: float) -> Budget:
    return Budget(kind, rho, GROUPS, WIDE, BOUNDS)


def projected(budget: Budget, z: Tensor) -> Tensor:
    return torch.from_numpy(budget.project(z.numpy()))


def random_z(seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + scale * torch.randn(112, dtype=torch.float64, generator=generator)


def test_expected_costs_are_the_means_over_all_masks() -> None:
    costs, net = costs_of(3, 4)
    atoms = small_map(net).num_atoms
    s = torch.linspace(0.1, 0.9, atoms, dtype=torch.float64)
    flops = parameters = 0.0
    for kept in itertools.product([False, True], repeat=atoms):
        mask = torch.tensor(kept)
        p = float(torch.where(mask, s, 1 - s).prod())
        flops += p * costs.flops(mask)
        parameters += p * costs.parameters(mask)
    assert float(costs.expected_flops(s)) == pytest.approx(flops)
    assert float(costs.expected_parameters(s)) == pytest.approx(parameters)
    full = torch.ones(atoms, dtype=torch.float64)
    assert float(costs.expected_flops(full)) == costs.dense_flops


@pytest.mark.parametrize("kind", ["count", *NONLINEAR])
@pytest.mark.parametrize("rho", [0.05, 0.25, 0.8])
def test_a_run_starts_with_one_probability_that_spends_the_budget(kind: BudgetName, rho: float) -> None:
    budget = budget_of(kind, rho)
    s = budget.start()
    assert float(s.min()) == float(s.max())
    assert budget.spent(s) == pytest.approx(budget.limit, rel=1e-6)
    whole = {"count": 112, "params": WIDE.dense_parameters, "flops": WIDE.dense_flops}[kind]
    assert budget.limit == pytest.approx(rho * whole)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NONLINEAR), st.floats(0.03, 0.9), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 3.0])
)
def test_the_projection_meets_bounds_and_budget(
    kind: BudgetName, rho: float, seed: int, scale: float
) -> None:
    """And keeps the order within a group."""
    budget = budget_of(kind, rho)
    z = random_z(seed, scale)
    s = projected(budget, z)
    assert BOUNDS[0] <= float(s.min())
    assert float(s.max()) <= BOUNDS[1]
    assert budget.spent(s) <= budget.limit * (1 + 1e-8)
    clipped = z.clamp(*BOUNDS)
    if budget.spent(clipped) <= budget.limit:
        assert torch.equal(s, clipped)
    else:
        assert budget.spent(s) == pytest.approx(budget.limit, rel=1e-6)
        inside = (s > BOUNDS[0] + 1e-3) & (s < BOUNDS[1] - 1e-3)
        leaf = s.clone().requires_grad_()
        expected = WIDE.expected_parameters(leaf) if kind == "params" else WIDE.expected_flops(leaf)
        (cost,) = torch.autograd.grad(expected, leaf)
        multipliers = ((z - s) / cost)[inside]
        if len(multipliers):  # about one multiplier for all: about the nearest point that the budget allows
            assert float(multipliers.max()) == pytest.approx(float(multipliers.min()), rel=0.1)
            assert float(multipliers.min()) >= 0
    for group in GROUPS:
        order = z[group.start : group.stop].argsort()
        assert bool((s[group.start : group.stop][order].diff() >= -1e-12).all())
    torch.testing.assert_close(projected(budget, s), s, rtol=0, atol=1e-8)


def test_of_two_equal_probabilities_the_dearer_gives_way() -> None:
    budget = budget_of("flops", 0.25)
    s = projected(budget, torch.full((112,), 0.9, dtype=torch.float64))
    leaf = torch.full((112,), 0.5, dtype=torch.float64, requires_grad=True)
    (cost,) = torch.autograd.grad(WIDE.expected_flops(leaf), leaf)
    assert (float(s[0]) < float(s[-1])) == (float(cost[0]) > float(cost[-1]))
    assert float(s[0]) != float(s[-1])


def test_a_budget_of_atoms_is_the_paper_s_projection() -> None:
    z = random_z(0, 1.0)
    expected = project(z.numpy(), 0.3 * 112, *BOUNDS)
    assert torch.equal(projected(budget_of("count", 0.3), z), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["count", *NONLINEAR])
@pytest.mark.parametrize("rho", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_masks_come_as_close_to_the_budget_as_their_atoms_allow(
    kind: BudgetName, rho: float, seed: int
) -> None:
    budget = budget_of(kind, rho)
    generator = torch.Generator().manual_seed(seed)
    s = projected(budget, torch.rand(112, dtype=torch.float64, generator=generator))
    margin = torch.rand(112, dtype=torch.float64, generator=generator) / s
    mask = budget.mask(s, margin)
    assert budget.of_mask(mask) <= budget.limit * (1 + 1e-9)
    for atom in (~mask).nonzero().flatten().tolist():
        wider = mask.clone()
        wider[atom] = True
        assert budget.of_mask(wider) > budget.limit


@pytest.mark.parametrize("kind", ["count", *NONLINEAR])
def test_a_budget_below_the_minimum_widths_is_refused_at_the_start(kind: BudgetName) -> None:
    """Masks would exceed it in silence; of a family that of any member."""
    mask = torch.zeros(112, dtype=torch.bool)
    mask[[group.start for group in GROUPS]] = True
    whole = budget_of(kind, 1.0)
    least = whole.of_mask(mask) / whole.limit
    for budgets in ([], [least, 0.5]):
        config = PolicyConfig(rho=1.01 * least, budget=kind, budgets=[1.01 * share for share in budgets])
        assert Budget.of(config, GROUPS, WIDE).limit == pytest.approx(1.01 * least * whole.limit)
    less = 0.99 * least
    for few in (PolicyConfig(rho=less, budget=kind), PolicyConfig(budget=kind, budgets=[less])):
        with pytest.raises(ValueError, match=rf"of the {kind} is below .* lower atoms\.block") as error:
            Budget.of(few, GROUPS, WIDE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["count", *NONLINEAR])
@pytest.mark.parametrize("rho", [0.29, 0.32, 1.0])
def test_the_even_control_is_the_mask_that_a_search_begins_with(kind: BudgetName, rho: float) -> None:
    """Of blocks of 8, whose widths can only be rounded; it keeps the budget."""
    blocks = block_atoms(small_map(WIDE_NET), 8)
    costs = CostModel(WIDE_NET, blocks, INPUTS)
    config = PolicyConfig(rho=rho, budget=kind)
    mask = evenly_narrowed(config, blocks, costs)
    assert torch.equal(mask, WidthSearch(config, blocks.groups, 0, costs).mask)
    budget = Budget.of(config, blocks.groups, costs)
    assert budget.of_mask(mask) <= budget.limit * (1 + 1e-9)


def test_a_budget_that_the_floor_alone_exceeds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"raise policy\.rho"):
        Budget("flops", 1e-4, GROUPS, WIDE, (0.2, 0.8))
