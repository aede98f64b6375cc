"""Gradients in one flat buffer: those that torch makes, however many buckets they are copied in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload_sparse.engine import gradients
from offload_sparse.engine.gradients import FlatGradients
from offload_sparse.engine.losses import TAIL

ENTRIES = 8


class Net(nn.Module):
    """A sparse embedding, a frozen layer, one that is used twice, and one that only some passes reach."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, ENTRIES, sparse=True)
        self.frozen, self.twice, self.sometimes, self.never = (nn.Linear(ENTRIES, ENTRIES) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, more: bool) -> Tensor:
        x = torch.tanh(self.frozen(self.tokens(x)))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.sometimes(x) if more else x


@pytest.fixture(params=["one bucket", "a bucket per parameter"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1 << 20 if request.param == "one bucket" else 1)


def flat_of(net: nn.Module) -> FlatGradients:
    parameters = list(net.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    return FlatGradients(parameters, torch.full((size + TAIL,), torch.nan, dtype=torch.float64))


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("passes", [[True], [False], [False, True], [True, False, True], []])
def test_the_buffer_holds_the_sum_over_passes(passes: list[bool]) -> None:
    """Zero for what none has reached. Two steps in a row; the gradients of a step before, and of the loop's
    own passes, are no more, and those of a pass are written over by the next, as a CUDA graph does.
    """
    net = Net().double()
    found = flat_of(net)
    for seed in range(2):
        tokens = torch.randint(5, (len(passes), 6), generator=torch.Generator().manual_seed(seed))
        expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for x, more in zip(tokens, passes, strict=True):
            net.zero_grad()
            net(x, more).square().sum().backward()
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    expected[name] += parameter.grad.to_dense()
        found.begin(len(passes))
        assert found.empty
        made: list[Tensor] = []
        for x, more in zip(tokens, passes, strict=True):
            found.hold()
            for gradient in made:
                gradient.fill_(torch.nan)
            net(x, more).square().sum().backward()
            left = (p.grad for p in net.parameters())
            made = made or [grad for grad in left if grad is not None and not grad.is_sparse]
        assert found.empty == (not passes)
        found.end(list(torch.arange(float(TAIL)).double()))
        whole = torch.cat([value.flatten() for value in expected.values()])
        torch.testing.assert_close(found.flat, whole, rtol=1e-14, atol=1e-14)
        assert torch.equal(found.tail, torch.arange(float(TAIL)).double())
        assert all(parameter.grad is None for parameter in net.parameters())


def test_what_is_copied_is_freed_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    net = nn.Sequential(*(nn.Linear(ENTRIES, ENTRIES, bias=False) for _ in range(4))).double()
    found = flat_of(net)
    found.begin(1)
    held = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in net.parameters()))
        )
    net(torch.randn(2, ENTRIES, dtype=torch.float64)).sum().backward()
    assert held == [0, 0, 0, 0]


class Checkpointed(nn.Module):
    """A layer whose gradient comes in two parts: its passes are made again one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(ENTRIES, ENTRIES), nn.Linear(ENTRIES, ENTRIES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=True)
        return x


@pytest.mark.usefixtures("_size")
def test_a_gradient_that_comes_in_parts_is_whole() -> None:
    net = Checkpointed().double()
    x = torch.randn(2, ENTRIES, dtype=torch.float64)
    net(x).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    found = flat_of(net)
    found.begin(1)
    net(x).square().sum().backward()
    found.end([])
    torch.testing.assert_close(found.flat, expected, rtol=1e-14, atol=1e-14)


def test_a_part_that_comes_when_the_others_were_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "SENT_BYTES", 1)
    monkeypatch.setattr(dist, "all_reduce", lambda part, async_op: None)
    net = Checkpointed().double()
    found = flat_of(net)
    found.begin(1, sends=True)
    net(torch.randn(2, ENTRIES, dtype=torch.float64)).square().sum().backward()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        found.end([])
