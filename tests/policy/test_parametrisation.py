"""Probabilities per atom or per group: the same numbers in other coordinates, each with its own rate."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.parametrisation import Parametrisation
from tests.support.masks import vector

GROUPS = [Group("a", 0, 2), Group("b", 2, 3)]
START = torch.tensor([0.2, 0.4, 0.1, 0.3, 0.5], dtype=torch.float64)


def learner(start: Tensor = START, **config: object) -> Parametrisation:
    defaults: dict[str, object] = {"parametrisation": "atom", "optimizer": "sgd", "lr": 0.1}
    return Parametrisation(PolicyConfig(**(defaults | config)), GROUPS, start)  # type: ignore[arg-type]


def moved(found: Parametrisation, gradient: Tensor) -> Tensor:
    return torch.from_numpy(found.move(gradient.numpy()))


def test_a_step_of_atoms_goes_down_the_gradient() -> None:
    z = moved(learner(lr=0.05), vector(1, 0, -1, 2, 0))
    torch.testing.assert_close(z, START - 0.05 * vector(1, 0, -1, 2, 0))


def test_a_rate_sees_the_mean_of_the_gradient_over_its_group() -> None:
    z = moved(learner(parametrisation="group"), vector(1, 3, -1, 2, 5))
    torch.testing.assert_close(z, START - 0.1 * vector(2, 2, 2, 2, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["adam", "sgd"]))
def test_equal_atoms_of_a_group_stay_equal(seed: int, optimizer: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([0.3, 0.3, 0.6, 0.6, 0.6], dtype=torch.float64)
    found = learner(start, parametrisation="group", optimizer=optimizer)
    for _ in range(5):
        found.settle(found.move(torch.randn(5, dtype=torch.float64, generator=generator).numpy()))
    assert not torch.equal(found.s, start)
    torch.testing.assert_close(found.s[:2].diff(), vector(0), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.s[2:].diff(), vector(0, 0), atol=1e-14, rtol=0)


def test_what_the_projection_has_changed_is_where_the_next_step_starts() -> None:
    found = learner(parametrisation="group")
    found.settle(vector(0.1, 0.1, 0.7, 0.8, 0.9).numpy())
    torch.testing.assert_close(moved(found, torch.zeros(5).double()), vector(0.1, 0.1, 0.7, 0.8, 0.9))


@pytest.mark.parametrize("parametrisation", ["atom", "group"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_loaded_slots_resume_bit_for_bit(parametrisation: str, optimizer: str) -> None:
    config = {"parametrisation": parametrisation, "optimizer": optimizer}
    straight, other = learner(**config), learner(**config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        g = torch.randn(5, dtype=torch.float64, generator=generator)
        for found in (straight, other):
            found.settle(found.move(g.numpy()).clip(0.05, 0.95))
        resumed = learner(**config)
        resumed.load(other.s.clone(), {name: value.clone() for name, value in other.slots().items()})
        other = resumed
    assert torch.equal(straight.s, other.s)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_step_is_that_of_the_optimizer_of_torch(optimizer: str) -> None:
    """To the bit."""
    found, parameter = learner(optimizer=optimizer), torch.nn.Parameter(START.clone())
    make = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}[optimizer]
    theirs = make([parameter], lr=0.1, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        parameter.grad = torch.randn(5, dtype=torch.float64, generator=generator)
        found.settle(found.move(parameter.grad.numpy()))
        theirs.step()
        assert torch.equal(found.s, parameter.detach())


def test_slots_of_another_parametrisation_are_an_error() -> None:
    slots = learner(optimizer="adam").slots()
    with pytest.raises(ValueError, match=r"policy\.parametrisation"):
        learner(optimizer="adam", parametrisation="group").load(START, slots)
