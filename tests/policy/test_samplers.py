"""Masks are exact draws from p(m|s), equal on every rank, whatever was drawn before."""

import itertools
import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.policy.estimators import ESTIMATORS, Comparison
from offload_sparse.policy.samplers import (
    CANDIDATES,
    FIRST,
    RANKS,
    SECOND,
    Bernoulli,
    ConditionalBernoulli,
    FixedWidth,
    Persistent,
    Sampler,
    mask_generator,
    splitmix64,
    uniforms,
)
from tests.support.masks import all_masks, enumerated_gradient, groups_of, index_of, probabilities_of, vector

SAMPLERS = {
    "bernoulli": Bernoulli(6, 3),
    "antithetic": Bernoulli(6, 3, antithetic=True),
    "persistent": Persistent(6, 3, 0.3),
    "fixed_width": FixedWidth(groups_of(4, 2), (2, 1), 3),
}
S = vector(0.05, 0.3, 0.5, 0.95, 0.2, 0.7)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stream", [FIRST, SECOND])
def test_the_mean_of_many_draws_is_the_mean_of_the_distribution(name: str, stream: int) -> None:
    sampler: Sampler = SAMPLERS[name]
    draws = 4_000
    apart = 4 if name == "persistent" else 1  # rounds after which no atom is the same draw any more
    mean = sum(sampler.draw(S, apart * r, stream).mask.to(torch.float64) for r in range(draws)) / draws
    expected = sampler.mean(S)
    assert torch.all((mean - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_margin_tells_which_atoms_were_drawn(name: str) -> None:
    for round in range(20):
        mask, margin = SAMPLERS[name].draw(S, round, FIRST)
        assert torch.equal(mask, margin < 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_is_a_function_of_round_and_stream(name: str) -> None:
    sampler = SAMPLERS[name]
    there = [sampler.draw(S, r, stream).mask for r in range(8) for stream in (FIRST, SECOND)]
    back = [sampler.draw(S, r, stream).mask for r in range(7, -1, -1) for stream in (SECOND, FIRST)]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert len({tuple(mask.tolist()) for mask in there}) > 1


def test_independent_masks_are_independent_over_streams_and_rounds() -> None:
    s = torch.full((4096,), 0.5, dtype=torch.float64)
    sampler = Bernoulli(4096, 0)
    masks = [sampler.draw(s, r, stream).mask for r in (0, 1) for stream in (FIRST, SECOND, CANDIDATES)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            agreement = float((first == second).to(torch.float64).mean())
            assert abs(agreement - 0.5) < 5 * 0.5 / 4096**0.5


def test_antithetic_masks_share_their_uniforms() -> None:
    s = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    sampler = Bernoulli(64, 0, antithetic=True)
    for round in range(50):
        first, second = sampler.draw(s, round, FIRST).mask, sampler.draw(s, round, SECOND).mask
        assert not bool((first & second)[s < 0.5].any()), "at most one is kept where s is below a half"
        assert bool((first | second)[s > 0.5].all()), "at least one is kept where s is above a half"


# --- persistent masks ---


@pytest.mark.parametrize("refresh", [0.05, 0.3, 0.5, 1.0])
def test_the_reference_is_the_next_mask_and_differs_in_redrawn_atoms_only(refresh: float) -> None:
    sampler = Persistent(256, 1, refresh)
    s = torch.full((256,), 0.4, dtype=torch.float64)
    for round in range(12):
        first, second = sampler.draw(s, round, FIRST).mask, sampler.draw(s, round, SECOND).mask
        redrawn = sampler.redrawn(round)
        assert torch.equal(second, sampler.draw(s, round + 1, FIRST).mask)
        assert torch.equal(first[~redrawn], second[~redrawn])
        own = sampler.draw(s, round, RANKS + 1).mask
        assert torch.equal(own[~redrawn], first[~redrawn])
        assert not torch.equal(own, second)


@given(st.floats(0.02, 1), st.integers(0, 2**40))
def test_every_atom_has_its_turn_every_1_over_q_rounds(refresh: float, seed: int) -> None:
    sampler = Persistent(50, seed, refresh)
    period = math.ceil(1 / refresh)
    turns = torch.stack([sampler.redrawn(round) for round in range(3 * period)]).to(torch.int64)
    assert bool((turns[:period].sum(0) >= 1).all())
    assert bool(((turns.sum(0) - 3 * period * refresh).abs() < 1 + 1e-6).all())


def test_redrawn_atoms_are_drawn_independently_of_what_they_were() -> None:
    s = torch.full((20_000,), 0.5, dtype=torch.float64)
    sampler = Persistent(20_000, 7, 1.0)
    agreement = (sampler.draw(s, 0, FIRST).mask == sampler.draw(s, 0, SECOND).mask).to(torch.float64)
    assert abs(float(agreement.mean()) - 0.5) < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("name", ["vr_pge", "rloo"])
def test_the_estimate_of_redrawn_atoms_is_unbiased(name: str) -> None:
    """Exact expectation over all first masks and all values of the redrawn atoms; zero for the others."""
    atoms = 5
    masks = all_masks(atoms)
    generator = torch.Generator().manual_seed(2)
    losses = 3 + torch.randn(len(masks), dtype=torch.float64, generator=generator)
    s = torch.linspace(0.1, 0.7, atoms, dtype=torch.float64)
    sampler = Persistent(atoms, 11, 0.4)
    p, seen = probabilities_of(masks, s), set()
    for round in range(6):
        redrawn = sampler.redrawn(round)
        seen.add(tuple(redrawn.tolist()))
        mean = torch.zeros_like(s)
        for first, second in itertools.product(range(len(masks)), repeat=2):
            m, m_ref = masks[first], torch.where(redrawn, masks[second], masks[first])
            pair = Comparison(losses[first], losses[index_of(m_ref)], m, m_ref, s)
            mean += p[first] * p[second] * torch.where(redrawn, ESTIMATORS[name](pair), 0.0)
        expected = torch.where(redrawn, enumerated_gradient(masks, losses, s), 0.0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    assert len(seen) > 1


# --- fixed widths ---


def conditional(s: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """All masks bool[n, C] of a width, and their probabilities by definition."""
    masks = all_masks(len(s))
    masks = masks[masks.sum(1) == width]
    p = probabilities_of(masks, s)
    return masks, p / p.sum()


@pytest.mark.parametrize("width", [0, 1, 3, 5, 6])
def test_inclusion_probabilities_are_those_of_the_enumeration(width: int) -> None:
    masks, p = conditional(S, width)
    found = ConditionalBernoulli(S, width).inclusion()
    torch.testing.assert_close(found, p @ masks.to(torch.float64), rtol=1e-12, atol=1e-12)


def test_draws_of_a_width_have_the_probabilities_of_the_enumeration() -> None:
    masks, p = conditional(S, 3)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    given = ConditionalBernoulli(S, 3)
    counts = torch.zeros(64, dtype=torch.float64)
    for u in torch.rand(draws, 6, dtype=torch.float64, generator=generator):
        counts[index_of(given.draw(u))] += 1
    found = counts[index_of(masks)] / draws
    assert float(counts[index_of(masks)].sum()) == draws, "every draw has the width"
    assert torch.all((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-12)


def test_wide_groups_stay_finite() -> None:
    s = torch.full((2048,), 0.25, dtype=torch.float64)
    s[:4] = vector(0.001, 0.999, 0.5, 0.999)
    given = ConditionalBernoulli(s, 512)
    assert float(given.inclusion().sum()) == pytest.approx(512, rel=1e-9)
    assert int(given.draw(torch.rand(2048, dtype=torch.float64)).sum()) == 512


def test_the_table_of_one_group_at_a_time_is_in_memory() -> None:
    sampler = FixedWidth(groups_of(*[400] * 6), [100] * 6, 0)
    tracemalloc.start()
    sampler.draw(torch.full((2400,), 0.25, dtype=torch.float64), 0, FIRST)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 401 * 101 * 8


@pytest.mark.parametrize("name", ["pge", "vr_pge", "rloo"])
def test_the_score_of_fixed_widths_is_m_minus_its_mean_in_log_odds(name: str) -> None:
    """Exact expectation over all pairs of masks of fixed widths, against autograd through the definition."""
    groups, widths = groups_of(3, 3), (1, 2)
    sampler = FixedWidth(groups, widths, 0)
    s = vector(0.2, 0.5, 0.4, 0.9, 0.6, 0.3)
    masks = torch.stack([m for m in all_masks(6) if int(m[:3].sum()) == 1 and int(m[3:].sum()) == 2])
    losses = 3 + torch.randn(len(masks), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    leaf = s.clone().requires_grad_()
    p = probabilities_of(masks, leaf)
    ((p * losses).sum() / p.sum()).backward()
    p = (p / p.sum()).detach()
    mean = torch.zeros_like(s)
    for first, second in itertools.product(range(len(masks)), repeat=2):
        pair = Comparison(losses[first], losses[second], masks[first], masks[second], s, sampler.mean(s))
        mean += p[first] * p[second] * ESTIMATORS[name](pair)
    assert leaf.grad is not None
    torch.testing.assert_close(mean, leaf.grad, rtol=0, atol=1e-12)


# --- generators ---


def test_a_generator_depends_on_seed_round_and_stream_only() -> None:
    first = uniforms(8, mask_generator(1, 2, 3))
    torch.rand(100)
    assert torch.equal(first, uniforms(8, mask_generator(1, 2, 3)))
    others = [mask_generator(2, 1, 3), mask_generator(1, 3, 2), mask_generator(1, 2), mask_generator(0, 2, 3)]
    assert all(not torch.equal(first, uniforms(8, other)) for other in others)


def test_drawing_masks_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for sampler in SAMPLERS.values():
        sampler.draw(S, 0, FIRST)
    assert torch.equal(state, torch.get_rng_state())


def test_splitmix64_gives_its_published_values() -> None:
    """The first two outputs of the reference implementation for the seed 1234567, and the first for 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    assert splitmix64(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973
