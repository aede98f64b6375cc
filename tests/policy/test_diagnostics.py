"""Deaths, revivals, overlaps and loss differences are those of the stretch between two reports."""

import pytest
import torch

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.diagnostics import Diagnostics
from tests.support.masks import vector

GROUPS = [Group("a", 0, 2), Group("b", 2, 2)]
FLOOR = 0.01


def mask(*atoms: int) -> torch.Tensor:
    kept = torch.zeros(4, dtype=torch.bool)
    kept[list(atoms)] = True
    return kept


def test_deaths_and_revivals_count_atoms_that_reached_or_left_the_floor() -> None:
    found = Diagnostics(GROUPS, FLOOR, vector(0.5, 0.5, 0.5, FLOOR))
    report = found.report(vector(FLOOR, FLOOR, 0.3, 0.2))
    assert (report["deaths"], report["revivals"]) == (2, 1)
    assert report["group_keep"] == {"a": pytest.approx(FLOOR), "b": pytest.approx(0.25)}
    report = found.report(vector(0.4, FLOOR, 0.3, 0.2))
    assert (report["deaths"], report["revivals"]) == (0, 1)


def test_overlap_is_that_of_successive_masks_also_over_a_report() -> None:
    found = Diagnostics(GROUPS, FLOOR, vector(0.5, 0.5, 0.5, 0.5))
    for round, kept in enumerate([mask(0, 1), mask(0, 2), mask(0, 2, 3, 1)]):
        for difference in (1.0, 3.0):  # several comparisons of one round
            found.compared([difference], kept, round)
    assert found.report(vector(0.5, 0.5, 0.5, 0.5))["mask_overlap"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    found.compared([0.0], mask(3), 3)
    assert found.report(vector(0.5, 0.5, 0.5, 0.5))["mask_overlap"] == pytest.approx(1.0)


def test_loss_differences_have_a_mean_and_a_spread() -> None:
    found = Diagnostics(GROUPS, FLOOR, vector(0.5, 0.5, 0.5, 0.5))
    for difference in (1.0, 2.0, 6.0):
        found.compared([difference], mask(0), 0)
    report = found.report(vector(0.5, 0.5, 0.5, 0.5))
    assert report["loss_difference_mean"] == pytest.approx(3.0)
    assert report["loss_difference_std"] == pytest.approx((14 / 3) ** 0.5)
    quiet = found.report(vector(0.5, 0.5, 0.5, 0.5))
    assert quiet.keys() == {"deaths", "revivals", "group_keep"}, "nothing was compared since"


def test_a_state_carries_on() -> None:
    first = Diagnostics(GROUPS, FLOOR, vector(0.5, 0.5, 0.5, FLOOR))
    first.compared([2.0], mask(0, 1), 5)
    second = Diagnostics(GROUPS, FLOOR, vector(0.5, 0.5, 0.5, 0.5))
    second.load(first.state())
    for found in (first, second):
        found.compared([1.0], mask(1), 6)
    assert first.report(vector(0.5, 0.5, 0.5, 0.5)) == second.report(vector(0.5, 0.5, 0.5, 0.5))
