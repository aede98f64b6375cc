"""The control variate knows nothing of the masks that it is used with, and one value per group."""

import torch

from offload_sparse.policy.control import ControlVariate, pooled
from offload_sparse.structure.channel_map import Group

GROUPS = [Group("a", 0, 2), Group("b", 2, 3)]


def estimate(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_it_stands_still_within_a_round_and_then_takes_in_the_round_s_mean() -> None:
    control = ControlVariate(GROUPS, decay=0.75)
    assert control.of_round(0).tolist() == [0.0] * 5
    control.estimated(estimate(1, 3, 0, 0, 6))
    assert control.of_round(0).tolist() == [0.0] * 5
    control.estimated(estimate(3, 5, 0, 0, 6))
    assert control.of_round(1).tolist() == [0.75, 0.75, 0.5, 0.5, 0.5]
    assert control.of_round(2).tolist() == [0.75, 0.75, 0.5, 0.5, 0.5], "a round without estimates"


def test_it_is_carried_on_bit_for_bit_in_the_middle_of_a_round() -> None:
    generator = torch.Generator().manual_seed(0)
    straight, other = ControlVariate(GROUPS, 0.9), ControlVariate(GROUPS, 0.9)
    for step in range(12):
        for control in (straight, other):
            control.of_round(step // 4)
        g = torch.randn(5, dtype=torch.float64, generator=generator)
        straight.estimated(g)
        other.estimated(g)
        carried_on = ControlVariate(GROUPS, 0.9)
        carried_on.load({name: value.clone() for name, value in other.state().items()})
        other = carried_on
    assert torch.equal(straight.of_round(9), other.of_round(9))
    assert bool(straight.of_round(9).any())


def test_pooling_keeps_the_sum_of_every_group() -> None:
    g = estimate(1, 2, 3, 4, 5)
    assert pooled(g, GROUPS).tolist() == [1.5, 1.5, 4.0, 4.0, 4.0]
