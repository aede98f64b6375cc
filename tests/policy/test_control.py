"""The control variate knows nothing of the masks that it is used with, and one value per group."""

import pytest
import torch

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.control import ControlVariate, regressed

GROUPS = [Group("a", 0, 20), Group("b", 20, 30)]
WORTH = torch.cat([torch.full((20,), -0.5), torch.full((30,), 0.2)]).double()


def steps(count: int, seed: int = 0) -> torch.Tensor:
    """m - m' of pairs of random masks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (2, count, 50), generator=generator).double().diff(dim=0)[0]


def test_it_finds_what_a_channel_of_each_group_is_worth() -> None:
    data = steps(400)
    noise = 0.1 * torch.randn(400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = regressed(data @ WORTH[:, None] + noise, data, GROUPS)
    torch.testing.assert_close(found, WORTH, rtol=0.15, atol=0.0)  # the ridge takes a tenth
    assert len(found.unique()) == 2, "one value per group"


def test_it_stands_still_within_a_round_and_then_takes_in_what_was_compared() -> None:
    control, data = ControlVariate(GROUPS, decay=0.5), steps(6)
    for round in range(3):
        before = control.of_round(round)
        for step in data[2 * round : 2 * round + 2]:
            control.compared(float(step @ WORTH), step)
            assert torch.equal(control.of_round(round), before)
        assert bool(before.any()) == (round > 0)
    halves = torch.tensor([0.25, 0.25, 0.5, 0.5, 1, 1], dtype=torch.float64).sqrt()[:, None]
    expected = regressed(halves * (data @ WORTH[:, None]), halves * data, GROUPS)
    torch.testing.assert_close(control.of_round(3), expected)


def test_without_comparisons_it_is_zero() -> None:
    assert not bool(ControlVariate(GROUPS, 0.9).of_round(5).any())


def test_it_is_carried_on_bit_for_bit_in_the_middle_of_a_round() -> None:
    straight, other = ControlVariate(GROUPS, 0.9), ControlVariate(GROUPS, 0.9)
    for number, step in enumerate(steps(12)):
        for control in (straight, other):
            control.of_round(number // 4)
            control.compared(float(step.sum()), step)
        carried_on = ControlVariate(GROUPS, 0.9)
        carried_on.load({name: value.clone() for name, value in other.state().items()})
        other = carried_on
    assert torch.equal(straight.of_round(9), other.of_round(9))
    assert float(straight.of_round(9)[0]) == pytest.approx(1, abs=0.5)
