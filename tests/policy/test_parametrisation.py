"""Probabilities per atom or per group: the same numbers in other coordinates, each with its own rate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.parametrisation import Parametrisation

GROUPS = [Group("a", 0, 2), Group("b", 2, 3)]
START = torch.tensor([0.2, 0.4, 0.1, 0.3, 0.5], dtype=torch.float64)


def learner(start: Tensor = START, **config: object) -> Parametrisation:
    defaults: dict[str, object] = {
        "parametrisation": "atom",
        "optimizer": "sgd",
        "momentum": 0.0,
        "lr": 0.1,
        "group_lr": 0.1,
    }
    return Parametrisation(PolicyConfig(**(defaults | config)), GROUPS, start)  # type: ignore[arg-type]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_step_of_atoms_goes_down_the_gradient() -> None:
    z = learner().move(vector(1, 0, -1, 2, 0), 0.5)
    torch.testing.assert_close(z, START - 0.05 * vector(1, 0, -1, 2, 0))


def test_a_step_of_rates_and_deviations_is_the_projection_of_the_gradient_on_what_they_can_do() -> None:
    """s = r[group] + d: a rate sees the mean over its group, d what is left of the gradient."""
    g = vector(1, 3, -1, 2, 5)
    rates = learner(parametrisation="hierarchical", lr=0.0).move(g, 1.0)
    torch.testing.assert_close(rates, START - 0.1 * vector(2, 2, 2, 2, 2))
    offsets = learner(parametrisation="hierarchical", group_lr=0.0).move(g, 1.0)
    torch.testing.assert_close(offsets, START - 0.1 * vector(-1, 1, -3, 0, 3))


def test_group_learns_rates_only() -> None:
    g = vector(1, 3, -1, 2, 6)
    assert torch.equal(
        learner(parametrisation="group", lr=0.7).move(g, 1.0),
        learner(parametrisation="hierarchical", lr=0.0).move(g, 1.0),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["adam", "sgd"]))
def test_without_a_rate_for_atoms_equal_atoms_stay_equal(seed: int, optimizer: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([0.3, 0.3, 0.6, 0.6, 0.6], dtype=torch.float64)
    found = learner(start, parametrisation="hierarchical", optimizer=optimizer, lr=0.0)
    for _ in range(5):
        z = found.move(torch.randn(5, dtype=torch.float64, generator=generator), 1.0)
        found.settle(z)
    assert not torch.equal(found.s, start)
    torch.testing.assert_close(found.s[:2].diff(), vector(0), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.s[2:].diff(), vector(0, 0), atol=1e-14, rtol=0)


def test_what_the_projection_has_changed_is_carried_on_from() -> None:
    found = learner(parametrisation="hierarchical")
    found.settle(vector(0.1, 0.1, 0.7, 0.8, 0.9))
    torch.testing.assert_close(found.move(torch.zeros(5).double(), 1.0), vector(0.1, 0.1, 0.7, 0.8, 0.9))


@pytest.mark.parametrize("parametrisation", ["atom", "hierarchical"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_loaded_slots_carry_on_bit_for_bit(parametrisation: str, optimizer: str) -> None:
    config = {"parametrisation": parametrisation, "optimizer": optimizer, "momentum": 0.9}
    straight, other = learner(**config), learner(**config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        g = torch.randn(5, dtype=torch.float64, generator=generator)
        for found in (straight, other):
            found.settle(found.move(g, 1.0).clamp(0.05, 0.95))
        carried_on = learner(**config)
        carried_on.load(other.s.clone(), {name: value.clone() for name, value in other.slots().items()})
        other = carried_on
    assert torch.equal(straight.s, other.s)


def test_slots_of_another_parametrisation_are_an_error() -> None:
    slots = learner(optimizer="adam").slots()
    with pytest.raises(ValueError, match=r"policy\.parametrisation"):
        learner(optimizer="adam", parametrisation="hierarchical").load(START, slots)
