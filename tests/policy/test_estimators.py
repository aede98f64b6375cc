"""The estimators are unbiased: their exact expectation over all pairs of masks is the gradient."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.estimators import (
    CONTROLLED,
    ESTIMATORS,
    Comparison,
    ControlVariate,
    apart_factor,
    leave_one_out,
    paired_losses,
    precondition,
    preconditioned_rloo,
    regressed,
    rloo,
    vr_pge,
)
from tests.support.masks import all_masks, enumerated_gradient, index_of, probabilities_of

SIZES = [5, 6]


def random_problem(atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """(masks, a random loss for each mask, s)."""
    generator = torch.Generator().manual_seed(atoms)
    masks = all_masks(atoms)
    losses = 3 + torch.randn(len(masks), dtype=torch.float64, generator=generator)
    s = 0.05 + 0.9 * torch.rand(atoms, dtype=torch.float64, generator=generator)
    return masks, losses, s


def smooth_losses(masks: Tensor) -> Tensor:
    """Quadratic in the masks, around a level that is large against its changes."""
    generator = torch.Generator().manual_seed(1)
    m = masks.to(torch.float64)
    atoms = masks.shape[1]
    slope = torch.randn(atoms, dtype=torch.float64, generator=generator)
    curvature = 0.3 * torch.randn(atoms, atoms, dtype=torch.float64, generator=generator)
    return 10 + m @ slope + ((m @ curvature) * m).sum(dim=1)


def all_pairs(name: str, masks: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, m', probability) of every pair that the estimator's sampling can give."""
    p, count, atoms = probabilities_of(masks, s), *masks.shape
    if name != CONTROLLED:
        first, second = (i.flatten() for i in torch.meshgrid(2 * [torch.arange(count)], indexing="ij"))
        return masks[first], masks[second], p[first] * p[second]
    # u below, between and above min(s, 1-s) and max(s, 1-s); in between both or neither is kept
    low, sure = torch.minimum(s, 1 - s), s > 0.5
    cases = torch.tensor(list(itertools.product(range(3), repeat=atoms)))
    m = torch.where(cases == 1, sure, cases == 2)
    m_ref = torch.where(cases == 1, sure, cases == 0)
    return m, m_ref, torch.where(cases == 1, 1 - 2 * low, low).prod(dim=1)


def exact_moments(
    name: str, masks: Tensor, losses: Tensor, s: Tensor, control: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact E[g] and E[|H g|^2] over all pairs of masks."""
    m, m_ref, p = all_pairs(name, masks, s)
    assert float(p.sum()) == pytest.approx(1)
    loss, reference_loss = losses[index_of(m)][:, None], losses[index_of(m_ref)][:, None]
    g = ESTIMATORS[name](Comparison(loss, reference_loss, m, m_ref, s, control=control))
    return p @ g, p @ (precondition(g, s) ** 2).sum(dim=1)


@pytest.mark.parametrize("atoms", SIZES)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_expectation_over_all_pairs_is_the_gradient(name: str, atoms: int) -> None:
    masks, losses, s = random_problem(atoms)
    mean, _ = exact_moments(name, masks, losses, s)
    torch.testing.assert_close(mean, enumerated_gradient(masks, losses, s), rtol=0, atol=1e-12)


def test_no_control_variate_that_is_fixed_beforehand_adds_a_bias() -> None:
    masks, losses, s = random_problem(5)
    control = torch.linspace(-3, 4, 5, dtype=torch.float64)
    mean, _ = exact_moments(CONTROLLED, masks, losses, s, control)
    torch.testing.assert_close(mean, enumerated_gradient(masks, losses, s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", SIZES)
def test_the_enumerated_gradient_is_that_of_autograd(atoms: int) -> None:
    masks, losses, s = random_problem(atoms)
    leaf = s.clone().requires_grad_()
    (probabilities_of(masks, leaf) * losses).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(enumerated_gradient(masks, losses, s), leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("pge", 20, 950),
        ("vr_pge", 1, 1),
        ("rloo", 0.4, 0.6),
        ("disarm_cv", 0.05, 0.36),
    ],
)
@pytest.mark.parametrize("atoms", SIZES)
def test_second_moments_relative_to_the_paper_s_estimator(
    name: str, least: float, most: float, atoms: int
) -> None:
    """On a smooth loss; the control variate is the gradient, which an average of past estimates nears."""
    masks = all_masks(atoms)
    losses = smooth_losses(masks)
    s = torch.linspace(0.1, 0.6, atoms, dtype=torch.float64)
    control = enumerated_gradient(masks, losses, s) if name == CONTROLLED else None
    paper = exact_moments("vr_pge", masks, losses, s)[1]
    ours = exact_moments(name, masks, losses, s, control)[1]
    assert least <= float(ours / paper) <= most


def test_the_formulas_are_those_of_the_papers() -> None:
    s = torch.tensor([0.25, 0.25], dtype=torch.float64)
    m, m_ref = torch.tensor([True, False]), torch.tensor([False, False])
    control = torch.tensor([0.5, 7.0], dtype=torch.float64)
    pair = Comparison(5.0, 3.0, m, m_ref, s, control=control)
    expected = {
        "pge": [5 * 0.75 / 0.1875, -5 * 0.25 / 0.1875],
        "vr_pge": [2 * 0.75 / 0.1875, -2 * 0.25 / 0.1875],
        "rloo": [1 / 0.1875, 0.0],
        "disarm_cv": [0.75 / 0.25 + 0.5, 7.0],
    }
    assert expected.keys() == ESTIMATORS.keys()
    for name, values in expected.items():
        assert ESTIMATORS[name](pair).tolist() == pytest.approx(values), name
    ones = torch.ones(2, dtype=torch.float64)
    assert precondition(ones, s).tolist() == pytest.approx([0.1875**0.5] * 2)


@given(st.integers(0, 1000), st.floats(-5, 5))
def test_rloo_is_preconditioned_in_one_go(seed: int, difference: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    s = 0.005 + 0.99 * torch.rand(9, dtype=torch.float64, generator=generator)
    m, m_ref = (torch.rand(9, generator=generator) < s for _ in range(2))
    expected = precondition(rloo(Comparison(difference, 0.0, m, m_ref, s)), s)
    step = (m.double() - m_ref.double()).numpy()
    found = torch.from_numpy(preconditioned_rloo(difference, step, s.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_rloo_does_not_depend_on_which_mask_comes_first() -> None:
    masks, losses, s = random_problem(5)
    there = rloo(Comparison(losses[3], losses[20], masks[3], masks[20], s))
    assert torch.equal(there, rloo(Comparison(losses[20], losses[3], masks[20], masks[3], s)))
    assert not torch.equal(there, vr_pge(Comparison(losses[3], losses[20], masks[3], masks[20], s)))


def test_leave_one_out_of_two_samples_is_rloo() -> None:
    masks, losses, s = random_problem(5)
    pair = torch.tensor([7, 22])
    expected = rloo(Comparison(losses[7], losses[22], masks[7], masks[22], s))
    torch.testing.assert_close(leave_one_out(losses[pair], masks[pair], s), expected)


def test_leave_one_out_over_ranks_is_unbiased() -> None:
    """Exact expectation over a common mask and one reference per rank; every rank has a loss of its own."""
    atoms, ranks = 3, 2
    masks, _, s = random_problem(atoms)
    generator = torch.Generator().manual_seed(0)
    on_rank = torch.randn(ranks, len(masks), dtype=torch.float64, generator=generator) * 3 + 5
    p = probabilities_of(masks, s)
    mean = torch.zeros_like(s)
    for common, *references in itertools.product(range(len(masks)), repeat=1 + ranks):
        first = on_rank[:, common]
        second = torch.stack([on_rank[r, i] for r, i in enumerate(references)])
        chosen = torch.tensor([common, *references])
        g = leave_one_out(paired_losses(first, second), masks[chosen], s)
        mean += p[chosen].prod() * g
    gradients = torch.stack([enumerated_gradient(masks, losses, s) for losses in on_rank])
    torch.testing.assert_close(mean, gradients.mean(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_leave_one_out_over_masks_drawn_apart_is_unbiased(ranks: int) -> None:
    """Exact expectation over where the common uniform of each atom lies; the first atom is in one mask."""
    masks, losses, _ = random_problem(3)
    s = torch.tensor([0.3, 0.55, 0.8], dtype=torch.float64)
    shifts = torch.arange(ranks, dtype=torch.float64) / ranks
    cases = []
    for keep in s:  # between two cuts the masks of an atom are the same for every u
        cuts = torch.cat([(-shifts) % 1, (keep - shifts) % 1, torch.tensor([0.0, 1.0])]).sort().values
        middles, lengths = (cuts[1:] + cuts[:-1]) / 2, cuts.diff()
        cases.append([((m + shifts) % 1 < keep, p) for m, p in zip(middles, lengths, strict=True) if p > 0])
    mean = torch.zeros_like(s)
    for atoms in itertools.product(*cases):
        drawn = torch.stack([kept for kept, _ in atoms], dim=1)
        own = torch.stack([losses[index_of(mask)] for mask in drawn])
        mean += torch.stack([p for _, p in atoms]).prod() * leave_one_out(own, drawn, s)
    torch.testing.assert_close(mean / apart_factor(s, ranks), enumerated_gradient(masks, losses, s))
    assert not bool((cases[0][0][0].sum() > 1).any())


def test_more_samples_vary_less() -> None:
    """Exact second moments at three atoms: three samples against two."""
    masks, losses, s = random_problem(3)
    p = probabilities_of(masks, s)
    moments = []
    for samples in (2, 3):
        second = 0.0
        for indices in itertools.product(range(len(masks)), repeat=samples):
            chosen = torch.tensor(indices)
            g = leave_one_out(losses[chosen], masks[chosen], s)
            second += float(p[chosen].prod() * (g**2).sum())
        moments.append(second - float((enumerated_gradient(masks, losses, s) ** 2).sum()))
    assert moments[1] < 0.75 * moments[0]


# --- control variate ---

GROUPS = [Group("a", 0, 20), Group("b", 20, 30)]
WORTH = torch.cat([torch.full((20,), -0.5), torch.full((30,), 0.2)]).double()


def steps(count: int, seed: int = 0) -> torch.Tensor:
    """m - m' of pairs of random masks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (2, count, 50), generator=generator).double().diff(dim=0)[0]


def test_the_control_variate_finds_what_a_channel_of_each_group_is_worth() -> None:
    data = steps(400)
    noise = 0.1 * torch.randn(400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = regressed(data @ WORTH[:, None] + noise, data, GROUPS)
    torch.testing.assert_close(found, WORTH, rtol=0.15, atol=0.0)  # the ridge takes a tenth
    assert len(found.unique()) == 2, "one value per group"


def test_the_control_variate_moves_between_rounds() -> None:
    """Within a round it stands still; then it takes in what was compared."""
    control, data = ControlVariate(GROUPS), steps(6)
    for round in range(3):
        before = control.of_round(round)
        for step in data[2 * round : 2 * round + 2]:
            control.compared(float(step @ WORTH), step)
            assert torch.equal(control.of_round(round), before)
        assert bool(before.any()) == (round > 0)
    age = torch.tensor([2, 2, 1, 1, 0, 0], dtype=torch.float64)[:, None]
    weight = (0.95**age).sqrt()
    expected = regressed(weight * (data @ WORTH[:, None]), weight * data, GROUPS)
    torch.testing.assert_close(control.of_round(3), expected)


def test_without_comparisons_the_control_variate_is_zero() -> None:
    assert not bool(ControlVariate(GROUPS).of_round(5).any())


def test_the_control_variate_resumes_bit_for_bit_in_the_middle_of_a_round() -> None:
    straight, other = ControlVariate(GROUPS), ControlVariate(GROUPS)
    for number, step in enumerate(steps(12)):
        for control in (straight, other):
            control.of_round(number // 4)
            control.compared(float(step.sum()), step)
        resumed = ControlVariate(GROUPS)
        resumed.load({name: value.clone() for name, value in other.state().items()})
        other = resumed
    assert torch.equal(straight.of_round(9), other.of_round(9))
    assert float(straight.of_round(9)[0]) == pytest.approx(1, abs=0.5)
