"""What a network can use: no group too narrow, no mask above the cap, the most probable atoms first."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.widths import of_expected_widths, respect_widths
from tests.support.masks import groups_of, vector

Case = tuple[Tensor, Tensor, list[Group], int]


@st.composite
def draws(draw: st.DrawFn) -> Case:
    """(s, u, groups, cap) with a cap that has room for an atom of every group."""
    groups = groups_of(*draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)))
    count = groups[-1].stop
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    s = torch.rand(count, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        s = (4 * s).round() / 4  # ties, and probabilities of exactly 0 and 1
    cap = draw(st.integers(len(groups), count))
    return s, torch.rand(count, dtype=torch.float64, generator=generator), groups, cap


@given(draws())
def test_every_group_keeps_an_atom(case: Case) -> None:
    s, u, groups, cap = case
    kept = respect_widths(u < s, s, groups, cap, u / s)
    for group in groups:
        assert bool(kept[group.start : group.stop].any())


@given(draws())
def test_a_draw_that_fits_is_not_touched(case: Case) -> None:
    s, u, groups, cap = case
    mask = u < s
    fits = all(bool(mask[g.start : g.stop].any()) for g in groups) and int(mask.sum()) <= cap
    assert torch.equal(respect_widths(mask, s, groups, cap, u / s), mask) or not fits


@given(draws())
def test_what_the_cap_drops_was_less_sure_than_what_it_spares(case: Case) -> None:
    s, u, groups, cap = case
    before = respect_widths(u < s, s, groups, groups[-1].stop, u / s)
    after = respect_widths(u < s, s, groups, cap, u / s)
    dropped = before & ~after
    assert not bool((after & ~before).any())
    assert int(after.sum()) == min(cap, int(before.sum()))
    spared = torch.zeros_like(after)
    for group in groups:
        inside = after[group.start : group.stop]
        if int(inside.sum()) > 1:
            spared[group.start : group.stop] = inside
    if bool(dropped.any()) and bool(spared.any()):
        assert float((u / s)[dropped].min()) >= float((u / s)[spared].max())


def test_an_empty_group_takes_its_most_probable_atom() -> None:
    """Of equally probable ones that with the lowest index."""
    s = vector(0.2, 0.3, 0.3, 0.1, 0.9)
    kept = respect_widths(torch.zeros(5, dtype=torch.bool), s, groups_of(4, 1), 5, torch.ones(5))
    assert kept.tolist() == [False, True, False, False, True]


def test_a_draw_is_not_changed_in_place() -> None:
    mask = torch.zeros(4, dtype=torch.bool)
    respect_widths(mask, torch.full((4,), 0.5), groups_of(4), 4, torch.ones(4))
    assert not mask.any()


@given(draws(), st.integers(1, 4), st.floats(0, 40))
def test_a_mask_of_expected_widths_keeps_the_budget(case: Case, least: int, budget: float) -> None:
    """And the minimum widths of all groups."""
    s, u, groups, _ = case
    mask = of_expected_widths(s, u / s, groups, least, lambda mask: int(mask.sum()) <= budget + 1e-9)
    needed = sum(min(least, group.size) for group in groups)
    assert int(mask.sum()) == min(len(s), max(int(budget + 1e-9), needed))
    for group in groups:
        assert int(mask[group.start : group.stop].sum()) >= min(least, group.size)
        inside, margin = mask[group.start : group.stop], (u / s)[group.start : group.stop]
        if bool(inside.any()) and not bool(inside.all()):
            assert float(margin[inside].max()) <= float(margin[~inside].min())


def test_widths_are_those_that_draws_have_in_the_mean() -> None:
    s = torch.cat([torch.full((8,), 0.75), torch.full((16,), 0.25), torch.full((10,), 0.1)]).double()
    mask = of_expected_widths(s, 1 - s, groups_of(8, 16, 10), 1, lambda mask: int(mask.sum()) <= 11)
    assert [int(mask[:8].sum()), int(mask[8:24].sum()), int(mask[24:].sum())] == [6, 4, 1]


def test_equal_probabilities_narrow_all_groups_evenly() -> None:
    s = torch.full((24,), 0.25, dtype=torch.float64)
    mask = of_expected_widths(s, 1 - s, groups_of(8, 16), 1, lambda mask: int(mask.sum()) <= 6)
    assert int(mask[:8].sum()) == 2
    assert int(mask[8:].sum()) == 4


def test_what_is_left_of_a_budget_goes_to_a_cheaper_group() -> None:
    s = torch.full((4,), 0.5, dtype=torch.float64)
    price = torch.tensor([5, 5, 1, 1])
    mask = of_expected_widths(s, 1 - s, groups_of(2, 2), 1, lambda mask: int(price[mask].sum()) <= 8)
    assert mask.tolist() == [True, False, True, True]


def test_what_a_dear_atom_leaves_makes_no_cheap_group_wide() -> None:
    """A fourth dear atom does not fit; what it leaves would pay for 95 cheap ones."""
    groups = groups_of(6, 100)
    price = torch.cat([torch.full((6,), 100.0), torch.ones(100)])
    s = torch.full((106,), 0.5, dtype=torch.float64)
    mask = of_expected_widths(s, 1 - s, groups, 1, lambda mask: float(price[mask].sum()) <= 395)
    assert (int(mask[:6].sum()), int(mask[6:].sum())) == (3, 63), "58 in proportion, and a tenth more"
