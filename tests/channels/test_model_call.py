"""Inputs are taken as they are, and both modes of a network are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.check import self_test
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.model_call import modes_differ, seeded
from offload_sparse.channels.subnet import build_on_meta, meta_copy
from offload_sparse.store.initialisation import build_seeded
from tests.support.channel_maps import Net

TOKENS = torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0))
IMAGES = (torch.zeros(2, 3, 16, 16),)


class Text(nn.Module):
    """Tokens, and whatever else comes with them, to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g = nn.Embedding(10, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.g(functional.relu(self.f(self.e(tokens).mean(1))))


class Masked(Text):
    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        x = functional.relu(self.f(self.e(tokens))).masked_fill(~keep[..., None], 0.0)
        return self.g(x.sum(1) / keep.sum(1, keepdim=True))


class Lengths(Text):
    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        last = self.e(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return self.g(functional.relu(self.f(last)))


class Nested(Text):
    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        tokens, (kind, scale) = batch["tokens"], batch["extra"]
        return super().forward(tokens) * scale + functional.one_hot(kind, 4)


KINDS: dict[str, tuple[type[nn.Module], tuple[Any, ...]]] = {
    "tokens": (Text, (TOKENS,)),
    "a mask": (Masked, (TOKENS, torch.tensor([[True] * 5, [True, True, False, False, False]]))),
    "lengths": (Lengths, (TOKENS, torch.tensor([5, 2]))),
    "nested": (Nested, ({"tokens": TOKENS, "extra": (torch.tensor([3, 0]), 2.0)},)),
    "bytes": (Text, (TOKENS.to(torch.int32),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_keeps_the_values_of_inputs_that_are_not_floating(kind: str) -> None:
    build, inputs = KINDS[kind]
    model = meta_copy(build())
    channel_map = discover(model, inputs)
    assert channel_map.num_atoms >= 32
    for _ in range(5):  # uninitialised memory differs from call to call
        assert self_test(model, inputs, channel_map).error < 1e-10
    CostModel(model, channel_map, inputs)


class Auxiliary(nn.Module):
    """A head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.fc = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)
        self.aux: nn.Module = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.b1(self.c1(x)))

    def forward(self, x: Tensor) -> Any:
        h = self.features(x).mean((2, 3))
        return (self.fc(h), self.aux(h)) if self.training else self.fc(h)


class ConvAux(Auxiliary):
    """An auxiliary branch with a width of its own, behind a norm that its own ``train`` keeps fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(16, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def train(self, mode: bool = True) -> ConvAux:
        super().train(mode)
        self.b1.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        out = self.fc(h.mean((2, 3)))
        return {"out": out, "aux": self.aux(h).mean((2, 3))} if self.training else {"out": out}


class EvaluationOnly(Auxiliary):
    """A projection that training skips."""

    def forward(self, x: Tensor) -> Any:
        h = self.features(x).mean((2, 3))
        return self.fc(h) if self.training else self.fc(h) + self.aux(h)


class TrainingGate(Auxiliary):
    """A gate between two widths that ties them in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Any:
        h, gate = self.features(x), self.c2(x)
        mixed = h * gate if self.training else h
        return self.fc(mixed.mean((2, 3))), self.aux(gate.mean((2, 3)))


@pytest.mark.parametrize("build", [Auxiliary, ConvAux, EvaluationOnly, TrainingGate])
def test_layers_that_run_in_one_mode_only_are_followed(build: type[Auxiliary]) -> None:
    model = meta_copy(build())
    assert modes_differ(meta_copy(model), (torch.zeros(2, 3, 16, 16, device="meta"),))
    channel_map = discover(model, IMAGES)
    axis = channel_map.axes["c1.weight"][0]
    assert axis is not None
    if build is TrainingGate:
        gate = channel_map.axes["c2.weight"][0]
        assert gate is not None
        assert axis.tolist() == gate.tolist()
    assert self_test(model, IMAGES, channel_map).error < 1e-10


def test_dropout_and_batch_statistics_are_no_difference_between_modes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1))
    assert not modes_differ(net, IMAGES)


DROPOUTS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "dropout": lambda x, on: functional.dropout(x, training=on),
    "of torch": lambda x, on: torch.dropout(input=x, p=0.5, train=on),
    "whole channels": lambda x, on: functional.dropout2d(x, training=on),
    "alpha": lambda x, on: functional.alpha_dropout(x, 0.5, on),
    "attention": lambda x, on: functional.scaled_dot_product_attention(x, x, x, None, 0.5 * on) + x,
    "attention by name": lambda x, on: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * on),
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_by_a_function_is_switched_off_too(kind: str) -> None:
    drop = DROPOUTS[kind]
    net = Net(lambda n, x: n.b(drop(n.a(x), n.training)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    channel_map = discover(net, IMAGES)
    assert channel_map.num_atoms == 8
    assert self_test(net, IMAGES, channel_map).error < 1e-10
    assert not modes_differ(net, IMAGES)


def test_a_norm_with_frozen_statistics_is_narrowed_with_its_channels() -> None:
    norm = FrozenBatchNorm2d(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    channel_map = discover(net, IMAGES)
    axis = channel_map.axes["1.running_var"][0]
    assert axis is not None
    assert axis.tolist() == list(range(8))
    assert self_test(net, IMAGES, channel_map).error < 1e-10


@pytest.mark.parametrize("in_use", [False, True])
def test_the_generators_of_a_device_are_put_back(in_use: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or not touched, as torch would seed them when they are used first: what a loop draws is its own."""
    generator = torch.tensor(7)
    for name, function in {
        "is_initialized": lambda: in_use,
        "device_count": lambda: 1,
        "manual_seed_all": generator.fill_,
        "get_rng_state": lambda device: generator.clone(),
        "set_rng_state": lambda state, device: generator.copy_(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    inside: list[int] = []

    def build() -> nn.Module:
        inside.append(int(generator))
        return nn.Linear(2, 2)

    before = torch.get_rng_state()
    build_on_meta(build)
    build_seeded(build, 5)
    with seeded(6):
        build()
    assert inside == ([0, 5, 6] if in_use else [7, 7, 7])
    assert int(generator) == 7
    assert torch.equal(torch.get_rng_state(), before)
