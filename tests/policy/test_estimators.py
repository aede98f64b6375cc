"""The estimators are unbiased: their exact expectation over all pairs of masks is the gradient."""

import itertools

import pytest
import torch
from torch import Tensor

from offload_sparse.policy.estimators import (
    ESTIMATORS,
    leave_one_out,
    paired_losses,
    precondition,
    rloo,
    vr_pge,
)

SIZES = [5, 6]


def all_masks(atoms: int) -> Tensor:
    """bool[2^C, C]."""
    return torch.tensor(list(itertools.product([False, True], repeat=atoms)))


def probabilities_of(masks: Tensor, s: Tensor) -> Tensor:
    """p(m | s) of each mask: float64[2^C], differentiable in s."""
    return torch.where(masks, s, 1 - s).prod(dim=1)


def random_problem(atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """(masks, a random loss for each mask, s)."""
    generator = torch.Generator().manual_seed(atoms)
    masks = all_masks(atoms)
    losses = 3 + torch.randn(len(masks), dtype=torch.float64, generator=generator)
    s = 0.05 + 0.9 * torch.rand(atoms, dtype=torch.float64, generator=generator)
    return masks, losses, s


def exact_moments(name: str, masks: Tensor, losses: Tensor, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Exact E[H g] and E[|H g|^2] over all pairs of masks."""
    p = probabilities_of(masks, s)
    mean, second = torch.zeros_like(s), torch.zeros((), dtype=torch.float64)
    for i in range(len(masks)):
        g = ESTIMATORS[name](losses[i] - losses[:, None], masks[i].expand_as(masks), masks, s)
        g = precondition(g, s, alpha)
        mean += p[i] * (p @ g)
        second += p[i] * (p @ (g**2).sum(dim=1))
    return mean, second


def enumerated_gradient(masks: Tensor, losses: Tensor, s: Tensor) -> Tensor:
    """d/ds_c E[L] = E[L | m_c = 1] - E[L | m_c = 0]."""
    p = probabilities_of(masks, s)
    given_kept = [(p * losses)[masks[:, c]].sum() / s[c] for c in range(len(s))]
    given_dropped = [(p * losses)[~masks[:, c]].sum() / (1 - s[c]) for c in range(len(s))]
    return torch.stack(given_kept) - torch.stack(given_dropped)


@pytest.mark.parametrize("atoms", SIZES)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_expectation_over_all_pairs_is_the_gradient(name: str, atoms: int) -> None:
    masks, losses, s = random_problem(atoms)
    mean, _ = exact_moments(name, masks, losses, s, alpha=0.0)
    torch.testing.assert_close(mean, enumerated_gradient(masks, losses, s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", SIZES)
def test_the_enumerated_gradient_is_that_of_autograd(atoms: int) -> None:
    masks, losses, s = random_problem(atoms)
    leaf = s.clone().requires_grad_()
    (probabilities_of(masks, leaf) * losses).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(enumerated_gradient(masks, losses, s), leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", SIZES)
def test_rloo_has_about_half_the_second_moment_of_vr_pge(atoms: int) -> None:
    """On a smooth loss: quadratic in the masks, around a level that is large against its changes."""
    generator = torch.Generator().manual_seed(1)
    masks = all_masks(atoms)
    m = masks.to(torch.float64)
    slope = torch.randn(atoms, dtype=torch.float64, generator=generator)
    curvature = 0.3 * torch.randn(atoms, atoms, dtype=torch.float64, generator=generator)
    losses = 10 + m @ slope + ((m @ curvature) * m).sum(dim=1)
    s = 0.05 + 0.9 * torch.rand(atoms, dtype=torch.float64, generator=generator)
    paper = exact_moments("vr_pge", masks, losses, s, alpha=0.5)[1]
    ours = exact_moments("rloo", masks, losses, s, alpha=0.5)[1]
    assert 0.25 < float(ours / paper) < 0.75


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_atom_that_is_certain_gets_no_estimate(name: str) -> None:
    s = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    m, m_ref = torch.tensor([False, True, True]), torch.tensor([True, False, False])
    g = ESTIMATORS[name](1.5, m, m_ref, s)
    assert g[0] == 0
    assert g[2] == 0
    assert g[1] == pytest.approx(3.0)
    assert torch.isfinite(precondition(g, s, 0.5)).all()


def test_the_formulas_are_those_of_the_papers() -> None:
    s = torch.tensor([0.25, 0.25], dtype=torch.float64)
    m, m_ref = torch.tensor([True, False]), torch.tensor([False, False])
    assert vr_pge(2.0, m, m_ref, s).tolist() == pytest.approx([2 * 0.75 / 0.1875, -2 * 0.25 / 0.1875])
    assert rloo(2.0, m, m_ref, s).tolist() == pytest.approx([1 / 0.1875, 0.0])
    ones = torch.ones(2, dtype=torch.float64)
    assert precondition(ones, s, 0.5).tolist() == pytest.approx([0.1875**0.5] * 2)


def test_rloo_does_not_depend_on_which_mask_comes_first() -> None:
    masks, losses, s = random_problem(5)
    difference = float(losses[3] - losses[20])
    there, back = rloo(difference, masks[3], masks[20], s), rloo(-difference, masks[20], masks[3], s)
    assert torch.equal(there, back)


def test_leave_one_out_of_two_samples_is_rloo() -> None:
    masks, losses, s = random_problem(5)
    pair = torch.tensor([7, 22])
    expected = rloo(losses[7] - losses[22], masks[7], masks[22], s)
    torch.testing.assert_close(leave_one_out(losses[pair], masks[pair], s), expected)


def test_leave_one_out_over_ranks_is_unbiased_whatever_images_each_rank_has() -> None:
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
