"""Masks are exact Bernoulli draws, equal on every rank, never too narrow and never above the cap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.policy.samplers import (
    bernoulli,
    mask_generator,
    minimum_size,
    most_probable,
    respect_widths,
    splitmix64,
    uniforms,
)
from offload_sparse.structure.channel_map import Group


def groups_of(*sizes: int) -> list[Group]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Group(f"g{i}", start, size) for i, (start, size) in enumerate(zip(starts, sizes, strict=True))]


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def draws(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Group], int, int]:
    """(s, u, groups, min_width, cap) with a cap that the minimum widths allow."""
    groups = groups_of(*draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)))
    count = groups[-1].stop
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    s = torch.rand(count, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        s = (4 * s).round() / 4  # ties, and probabilities of exactly 0 and 1
    min_width = draw(st.integers(1, 4))
    cap = draw(st.integers(minimum_size(groups, min_width), count))
    return s, torch.rand(count, dtype=torch.float64, generator=generator), groups, min_width, cap


@given(draws())
def test_every_group_keeps_its_minimum_width(case: tuple[Tensor, Tensor, list[Group], int, int]) -> None:
    s, u, groups, min_width, cap = case
    kept = respect_widths(u < s, s, groups, min_width, cap, u)
    for group in groups:
        assert int(kept[group.start : group.stop].sum()) >= min(min_width, group.size)


@given(draws())
def test_the_cap_is_never_exceeded(case: tuple[Tensor, Tensor, list[Group], int, int]) -> None:
    s, u, groups, min_width, cap = case
    assert int(respect_widths(u < s, s, groups, min_width, cap, u).sum()) <= cap


@given(draws())
def test_a_draw_that_fits_is_not_touched(case: tuple[Tensor, Tensor, list[Group], int, int]) -> None:
    s, u, groups, min_width, cap = case
    mask = u < s
    wide = all(int(mask[g.start : g.stop].sum()) >= min(min_width, g.size) for g in groups)
    fits = wide and int(mask.sum()) <= cap
    assert torch.equal(respect_widths(mask, s, groups, min_width, cap, u), mask) or not fits


@given(draws())
def test_what_the_cap_drops_was_less_sure_than_what_it_spares(
    case: tuple[Tensor, Tensor, list[Group], int, int],
) -> None:
    s, u, groups, min_width, cap = case
    before = respect_widths(u < s, s, groups, min_width, groups[-1].stop, u)
    after = respect_widths(u < s, s, groups, min_width, cap, u)
    dropped = before & ~after
    assert not bool((after & ~before).any())
    assert int(after.sum()) == min(cap, int(before.sum()))
    spared = torch.zeros_like(after)
    for group in groups:
        inside = after[group.start : group.stop]
        if int(inside.sum()) > min(min_width, group.size):
            spared[group.start : group.stop] = inside
    if bool(dropped.any()) and bool(spared.any()):
        assert float((u / s)[dropped].min()) >= float((u / s)[spared].max())


def test_a_narrow_group_is_filled_with_its_most_probable_atoms_ties_by_index() -> None:
    s = vector([0.2, 0.3, 0.3, 0.1, 0.9])
    kept = respect_widths(torch.zeros(5, dtype=torch.bool), s, groups_of(4, 1), 2, 5, torch.ones(5))
    assert kept.tolist() == [False, True, True, False, True]
    kept = respect_widths(torch.zeros(5, dtype=torch.bool), s, groups_of(4, 1), 1, 5, torch.ones(5))
    assert kept.tolist() == [False, True, False, False, True]


def test_a_draw_is_not_changed_in_place() -> None:
    mask = torch.zeros(4, dtype=torch.bool)
    respect_widths(mask, torch.full((4,), 0.5), groups_of(4), 2, 4, torch.ones(4))
    assert not mask.any()


def test_a_cap_below_the_minimum_widths_is_an_error() -> None:
    with pytest.raises(ValueError, match="raise the cap"):
        respect_widths(torch.ones(4).bool(), torch.ones(4), groups_of(2, 2), 2, 3, torch.zeros(4))


def test_the_mean_of_many_draws_is_s() -> None:
    s = vector([0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
    draws = 20_000
    mean = sum(bernoulli(s, mask_generator(3, r)).to(torch.float64) for r in range(draws)) / draws
    assert torch.all((mean - s).abs() <= 5 * (s * (1 - s) / draws).sqrt())


def test_masks_of_one_round_are_independent_over_streams_and_rounds() -> None:
    s = torch.full((4096,), 0.5, dtype=torch.float64)
    masks = [bernoulli(s, mask_generator(0, r, stream)) for r in (0, 1) for stream in (0, 1)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            agreement = float((first == second).to(torch.float64).mean())
            assert abs(agreement - 0.5) < 5 * 0.5 / 4096**0.5


def test_a_generator_depends_on_seed_round_and_stream_only() -> None:
    first = uniforms(8, mask_generator(1, 2, 3))
    torch.rand(100)
    assert torch.equal(first, uniforms(8, mask_generator(1, 2, 3)))
    others = [mask_generator(2, 1, 3), mask_generator(1, 3, 2), mask_generator(1, 2), mask_generator(0, 2, 3)]
    assert all(not torch.equal(first, uniforms(8, other)) for other in others)


def test_drawing_masks_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    bernoulli(torch.full((8,), 0.5, dtype=torch.float64), mask_generator(0, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_splitmix64_gives_its_published_values() -> None:
    """The first two outputs of the reference implementation for the seed 1234567, and the first for 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    assert splitmix64(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973


@given(draws(), st.floats(0, 40))
def test_the_most_probable_mask_keeps_the_budget_and_the_minimum_widths(
    case: tuple[Tensor, Tensor, list[Group], int, int], budget: float
) -> None:
    s, _, groups, min_width, _ = case
    mask = most_probable(s, groups, budget, min_width)
    assert int(mask.sum()) == min(len(s), max(int(budget + 1e-9), minimum_size(groups, min_width)))
    for group in groups:
        assert int(mask[group.start : group.stop].sum()) >= min(min_width, group.size)


def test_the_most_probable_mask_keeps_the_largest_probabilities() -> None:
    s = vector([0.1, 0.2, 0.9, 0.8, 0.7, 0.6])
    assert most_probable(s, groups_of(2, 4), 3, 1).tolist() == [False, True, True, True, False, False]


def test_equal_probabilities_narrow_all_groups_evenly() -> None:
    s = torch.full((24,), 0.25, dtype=torch.float64)
    mask = most_probable(s, groups_of(8, 16), 6, 1)
    assert int(mask[:8].sum()) == 2
    assert int(mask[8:].sum()) == 4
