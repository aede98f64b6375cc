"""A ``StreamAdd`` adds operands with different channels; exposing the additions of a model changes nothing
else.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from offload_sparse.channels.stream_add import StreamAdd, additions, expose_additions
from offload_sparse.workloads.models import build_model
from tests.support.residual_nets import Block, ResidualNet

CPU = torch.device("cpu")


def scattered(x: Tensor, held: Tensor) -> Tensor:
    """``x`` at the positions where ``held`` is True, by a product with a selection matrix."""
    return torch.einsum("bc...,cp->bp...", x, torch.eye(len(held), dtype=x.dtype)[held])


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 6), st.sampled_from([(), (2, 3)]))
def test_each_operand_is_added_at_its_positions(
    data: st.DataObject, width: int, space: tuple[int, ...]
) -> None:
    flags = st.lists(st.booleans(), min_size=width, max_size=width).map(torch.tensor)
    held = (data.draw(flags), data.draw(flags))
    add = StreamAdd()
    add.hold(*held, CPU)
    x, y = (torch.randn(3, int(h.sum()), *space, dtype=torch.float64, requires_grad=True) for h in held)
    found, expected = add(x, y), scattered(x, held[0]) + scattered(y, held[1])
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), (x, y)),
        torch.autograd.grad((expected * probe).sum(), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_operands_of_two_types_give_the_wider_one_as_an_addition_does() -> None:
    add = StreamAdd()
    add.hold(torch.tensor([True, False]), torch.tensor([True, True]), CPU)
    assert add(torch.ones(1, 1), torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("torchvision/resnet18", 32, 8),
        ("torchvision/mobilenet_v2", 32, 10),
        ("timm/resnet18", 32, 8),
        ("offload_sparse/resnet20_cifar", 16, 9),
    ],
)
def test_an_exposed_model_computes_the_same_under_the_same_names(name: str, size: int, count: int) -> None:
    model = build_model(name)
    exposed = expose_additions(copy.deepcopy(model))
    assert len(list(additions(exposed))) == count
    assert list(exposed.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, size, size)
    again = copy.deepcopy(exposed)
    for training in (True, False):
        torch.manual_seed(0)  # dropout
        expected = model.train(training)(x)
        for network in (exposed, again):
            torch.manual_seed(0)
            assert torch.equal(network.train(training)(x), expected)


def test_exposing_twice_or_some_only() -> None:
    model = expose_additions(ResidualNet(), ["blocks.1.stream_add_0"])
    assert [name for name, _ in additions(model)] == ["blocks.1.stream_add_0"]
    assert isinstance(model.get_submodule("blocks.1"), Block)
    before = [id(m) for m in model.modules()]
    assert [id(m) for m in expose_additions(model, ["blocks.1.stream_add_0"]).modules()] == before
    assert len(list(additions(expose_additions(model)))) == 2


def test_a_name_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no addition .*7.stream_add_0"):
        expose_additions(ResidualNet(), ["blocks.7.stream_add_0"])


class Moody(nn.Module):
    """Adds in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu() if self.training else x


class Chooser(nn.Module):
    """Looks at values, which torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu() if x.sum() > 0 else x


class Optional(nn.Module):
    """Adds something that is rarely given."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return x if more is None else x + more


class Skipping(nn.Module):
    """Leaves its branch out at random, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(()).item() < 0.5 else x + x.relu()


@pytest.mark.parametrize(
    "model", [Moody(), Chooser(), Optional(), Skipping()], ids=lambda m: type(m).__name__
)
def test_a_forward_that_cannot_be_traced_once_and_for_all_is_left_alone(model: nn.Module) -> None:
    kind, states = type(model), torch.get_rng_state()
    for _ in range(8):  # of which the skipping one would run as many ways
        assert not list(additions(expose_additions(model)))
    assert type(model) is kind
    assert model.training
    assert torch.equal(torch.get_rng_state(), states), "nobody else's random numbers are drawn"


class Pooling(nn.Module):
    """Has a default that is no single value, and one that others may give."""

    def forward(self, x: Tensor, more: Tensor | None = None, size: tuple[int, int] = (1, 1)) -> Tensor:
        x = x + functional.avg_pool2d(x, size)
        return x if more is None else x * more


def test_a_forward_with_defaults_is_exposed_where_it_is_called_by_them() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.given = Pooling(), Pooling()

        def forward(self, x: Tensor) -> Tensor:
            return self.given(self.plain(x), x)

    x = torch.randn(2, 3, 4, 4)
    model = expose_additions(Outer(), inputs=(x,))
    assert [name for name, _ in additions(model)] == ["plain.stream_add_0"]
    assert torch.equal(model(x), Outer()(x))


def test_bias_like_additions_are_not_residual() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift + 3

    assert not list(additions(expose_additions(Shifted())))


class Aliased(nn.Module):
    """Changes a tensor in place by another name."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        z = y
        z *= 2
        z += x
        z -= 1
        z /= 3
        z **= 2
        z //= 0.5
        return y + x


def test_what_is_changed_in_place_stays_so_beside_an_exposed_addition() -> None:
    model, x = expose_additions(Aliased()), torch.randn(2, 3)
    assert [name for name, _ in additions(model)] == ["stream_add_0"]
    assert torch.equal(model(x), Aliased()(x))
