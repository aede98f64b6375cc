"""Probes find what channels are worth, with errors that are right; widths follow, bounded, at equal cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.policy.probe import (
    BUDGET_SHARE,
    LARGEST,
    MEAN_RATE,
    MOST,
    Comparisons,
    Worth,
    move,
    present_widths,
    probe_pair,
    probe_rates,
    stages,
    survivor_scales,
)
from tests.support.masks import groups_of, vector

GROUPS = groups_of(40, 40, 60, 60)
MASK = torch.ones(200, dtype=torch.bool)
RATES = vector(0.1, 0.1, 0.05, 0.07)
WORTH = vector(2.0, 1.0, -0.5, 0.0)
"""Loss per dropped share."""


def probed(pairs: int, noise: float = 0.0, seed: int = 0, mask: Tensor = MASK) -> Comparisons:
    """Comparisons of a loss that is linear in the dropped shares."""
    found = Comparisons(GROUPS)
    generator = torch.Generator().manual_seed(seed)
    width = present_widths(mask, GROUPS)
    for number in range(pairs):
        m, m_ref = probe_pair(mask, GROUPS, RATES, seed, number)
        losses = [float(WORTH @ (1 - present_widths(side, GROUPS) / width)) for side in (m, m_ref)]
        error = noise * float(torch.randn((), generator=generator))
        found.add(losses[0] - losses[1] + error, mask, m, m_ref)
    return found


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=20))
def test_all_groups_drop_the_same_cost_and_eight_percent_in_the_mean(slopes: list[float]) -> None:
    rates = probe_rates(vector(*slopes))
    assert float(rates.mean()) == pytest.approx(MEAN_RATE, rel=1e-6)
    assert float(rates.max()) <= MOST
    uncapped = rates < MOST
    saved = (rates * vector(*slopes))[uncapped]
    assert float(saved.max()) == pytest.approx(float(saved.min()), rel=1e-6)


def test_channels_are_dropped_at_the_rate_of_their_group() -> None:
    """Only channels that are present."""
    mask = torch.arange(200) % 4 != 0
    pairs = 2000
    kept = torch.zeros(200, dtype=torch.float64)
    for number in range(pairs):
        for side in probe_pair(mask, GROUPS, RATES, 3, number):
            assert not bool((side & ~mask).any())
            kept += side
    expected = mask * (1 - torch.repeat_interleave(RATES, torch.tensor([40, 40, 60, 60])))
    assert bool(((kept / (2 * pairs) - expected).abs() < 5 * (0.1 * 0.9 / (2 * pairs)) ** 0.5).all())


def test_a_pair_is_a_function_of_its_number_and_no_group_loses_all() -> None:
    narrow, rates = groups_of(1, 2, 30), vector(0.4, 0.4, 0.1)
    mask = torch.ones(33, dtype=torch.bool)
    there = [probe_pair(mask, narrow, rates, 1, n) for n in range(40)]
    back = [probe_pair(mask, narrow, rates, 1, n) for n in reversed(range(40))]
    for (a, b), (c, d) in zip(there, reversed(back), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert float(present_widths(a, narrow).min()) >= 1
    assert len({tuple(a.tolist()) for pair in there for a in pair}) > 40


def test_survivors_make_up_for_what_is_dropped_in_the_mean() -> None:
    """In every group, the narrow ones too, which always keep a channel."""
    groups, rates, mask = groups_of(2, 2, 4, 60), vector(0.4, 0.4, 0.3, 0.1), torch.arange(68) > 0
    scale = survivor_scales(mask, groups, rates)
    kept = sum(probe_pair(mask, groups, rates, 0, n)[0].double() for n in range(4000)) / 4000
    for group in groups:
        inside = mask[group.start : group.stop]
        shares = (scale * kept)[group.start : group.stop][inside]
        assert float(shares.mean()) == pytest.approx(1.0, abs=0.03)


def test_a_linear_loss_is_recovered() -> None:
    values, errors = probed(400).regressed()
    torch.testing.assert_close(values, WORTH, rtol=1e-4, atol=1e-4)
    assert bool((errors < 0.1).all())


def test_standard_errors_are_those_of_repeated_probes() -> None:
    """Over 36 probes: the spread of the estimates is what each of them says, around the truth."""
    noise = 0.1
    estimates, errors = zip(*(probed(120, noise, seed).regressed() for seed in range(36)), strict=True)
    found = torch.stack(list(estimates))
    said = torch.stack(list(errors)).mean(0)
    assert bool((found.std(0) / said > 0.6).all())
    assert bool((found.std(0) / said < 1.4).all())
    standard = said / 36**0.5
    assert bool(((found.mean(0) - WORTH).abs() < 4 * standard).all())


def test_what_varies_little_or_not_at_all_is_not_known_to_be_small() -> None:
    """A wide and dear group loses a small share of its channels in every pair, and varies a hundredth as much
    as a narrow one; its loss is found as well, or is said to be unknown.
    """
    groups, worth = groups_of(10, 4000, 10), vector(1.0, 50.0, 1.0)
    mask = torch.ones(4020, dtype=torch.bool)
    for wide, exact in ((0.02, True), (0.0, False)):
        found, rates = Comparisons(groups), vector(0.1, wide, 0.1)
        for number in range(60):
            m, m_ref = probe_pair(mask, groups, rates, 1, number)
            dropped = present_widths(m_ref, groups) - present_widths(m, groups)
            found.add(float((worth * dropped / vector(10, 4000, 10)).sum()), mask, m, m_ref)
        values, errors = found.regressed()
        torch.testing.assert_close(values[[0, 2]], worth[[0, 2]], rtol=1e-3, atol=1e-3)
        if exact:
            assert float(values[1]) == pytest.approx(50.0, rel=1e-3)
        else:
            assert float(errors[1]) > 1e3 * float(errors[0])


def test_comparisons_of_ranks_add_up() -> None:
    whole, parts = Comparisons(GROUPS), [Comparisons(GROUPS) for _ in range(3)]
    for number in range(60):
        pair = probe_pair(MASK, GROUPS, RATES, 0, number)
        for found in (whole, parts[number % 3]):
            found.add(float(number % 7), MASK, *pair)
    whole_values, whole_errors = whole.regressed()
    total = Comparisons(GROUPS)
    total.sums, total.count = sum(part.sums for part in parts), sum(part.count for part in parts)
    values, errors = total.regressed()
    torch.testing.assert_close(values, whole_values)
    torch.testing.assert_close(errors, whole_errors)


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    found = probed(30)
    before = found.sums.clone()
    found.add(float("nan"), MASK, *probe_pair(MASK, GROUPS, RATES, 0, 99))
    assert torch.equal(found.sums, before)
    assert found.count == 30


def test_a_stage_ends_where_sizes_or_costs_change() -> None:
    groups = groups_of(64, 64, 128, 128, 128)
    assert stages(groups, vector(1, 1.5, 1.2, 1.3, 0.4)).tolist() == [0, 0, 1, 1, 2]


def observed(values: Tensor, errors: Tensor, stage_of: Tensor) -> Worth:
    worth = Worth(stage_of)
    worth.observe(values, errors, torch.ones_like(values), 1.0)
    return worth


def test_sure_values_keep_their_distance_and_doubtful_ones_shrink() -> None:
    values = vector(3.0, -1.0, 2.0, -4.0)
    alone = torch.arange(4)
    sure, _ = observed(values, torch.full((4,), 1e-3).double(), alone).advantage()
    torch.testing.assert_close(sure.diff(), values.diff(), rtol=1e-2, atol=1e-2)
    doubtful, _ = observed(values, torch.full((4,), 50.0).double(), alone).advantage()
    assert float(doubtful.abs().max()) < 0.5
    mixed, _ = observed(values, vector(0.1, 0.1, 0.1, 20.0), alone).advantage()
    assert abs(float(mixed[3])) < abs(float(mixed[1]))


def test_layers_of_a_stage_share_what_the_data_do_not_tell_apart() -> None:
    values, stage = vector(2.0, 2.4, -2.0, -6.0), torch.tensor([0, 0, 1, 1])
    together, _ = observed(values, vector(0.3, 0.3, 0.3, 3.0), stage).advantage()
    apart, _ = observed(values, vector(0.3, 0.3, 0.3, 3.0), torch.arange(4)).advantage()
    assert abs(float(together[3] - together[2])) < abs(float(apart[3] - apart[2])) + 1e-9
    assert float(together[3]) < 0, "the sure neighbour speaks for it"


def test_later_cycles_count_for_more_and_errors_fall() -> None:
    worth = Worth(torch.arange(3))
    ones = torch.ones(3, dtype=torch.float64)
    for values in (vector(1, 0, 0), vector(0, 1, 0), vector(0, 1, 0)):
        worth.observe(values, 0.1 * ones, ones, 1.0)
    mean = worth.weighted / worth.precision
    assert float(mean[1]) == pytest.approx(1.5 / 1.75)
    assert float(mean[0]) == pytest.approx(0.25 / 1.75)
    assert bool((worth.precision > 100).all())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.integers(0, 99))
def test_moves_are_bounded_in_widths_and_in_units_of_the_budget(values: list[float], seed: int) -> None:
    advantage = vector(*values)
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(len(values), dtype=torch.float64, generator=generator) + 0.01
    change = move(advantage, 1.0, slopes, 2.0)
    assert float(change.abs().max()) <= LARGEST
    assert float((change * slopes).abs().max()) <= BUDGET_SHARE * 2.0 * (1 + 1e-12)
    assert bool((change * advantage >= 0).all()), "what is worth more grows"
    assert not bool(move(advantage, 0.0, slopes, 2.0).any())
