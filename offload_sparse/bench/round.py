"""A whole round of ours (sample, gather, K steps, estimate, scatter) over K steps of a hand-made narrow pair.

The narrow pair is what one would write by hand for the same work: two networks of ordinary parameters with
the widths of this round's subnets, trained in turns, the other evaluated on the same batch, with torch's
own optimizers. It never changes its widths, so it samples, gathers, estimates and scatters nothing. Both
sides take turns, round by round, in one process; the masks are new in every round, and the narrow pair is
copied from the subnets that the round has just used, outside the timing. It runs after ours and so finds
the kernels of these shapes compiled: the price of new shapes is ours alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    Batch,
    batch_of,
    default_device,
    loss_of,
    network_of,
    session_of,
    timed,
)
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload

RHO = 0.25

_PLAN = (("vgg19", 10, 5), ("vgg19", 50, 3), ("resnet50", 10, 5), ("resnet50", 50, 3))
"""Network, steps per round, rounds that count."""

_QUICK = (("vgg19", 10, 3),)


def run(quick: bool) -> BenchResult:
    """VGG-19 and ResNet-50 at K = 10 and 50; ``quick`` takes VGG-19 at K = 10."""
    device = default_device()
    result = BenchResult({}, {"device": str(device), "threads": torch.get_num_threads()}, _HEADER, [])
    for network, k, rounds in _QUICK if quick else _PLAN:
        times = measure(network, k, rounds, device)
        key = f"round.{network}.k{k}"
        result.ratios[f"{key}.vs_narrow"] = times.ratio
        result.raw[key] = {"ours_seconds": times.ours, "narrow_seconds": times.narrow}
        milliseconds = (times.round, times.narrow_round, times.first, times.last, times.between)
        result.table.append(
            [network, k, *(f"{1000 * t:.0f}" for t in milliseconds), f"{times.ratio:.3f}"]
        )
    return result


_HEADER = (
    *("network", "K", "round ms", "narrow ms", "first step + ms", "last step + ms", "K steps + ms"),
    "ours/narrow",
)
"""``+``: what our first step, our last step, and all our steps at the pace of the middle ones take beyond the
narrow pair's."""


@dataclass
class RoundTimes:
    """Seconds of every step, per round, of both sides."""

    ours: list[list[float]] = field(default_factory=list)
    narrow: list[list[float]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over rounds of ours over the narrow pair right after it."""
        return median(sum(a) / sum(b) for a, b in zip(self.ours, self.narrow, strict=True))

    @property
    def round(self) -> float:
        return median(map(sum, self.ours))

    @property
    def narrow_round(self) -> float:
        return median(map(sum, self.narrow))

    @property
    def first(self) -> float:
        """What opening a round costs: the first step beyond a middle one."""
        return median(steps[0] - median(steps) for steps in self.ours)

    @property
    def last(self) -> float:
        """What closing a round costs."""
        return median(steps[-1] - median(steps) for steps in self.ours)

    @property
    def between(self) -> float:
        """K times what a middle step of ours takes beyond one of the narrow pair."""
        pairs = zip(self.ours, self.narrow, strict=True)
        return median(len(a) * (median(a) - median(b)) for a, b in pairs)


def measure(
    network: str, k: int, rounds: int, device: torch.device, setup: Setup | None = None
) -> RoundTimes:
    """Rounds of both sides in turns, after one of each that does not count."""
    images, labels = batch_of(network, device)
    batch = (images.to((setup or Setup()).dtype), labels)
    return measure_model(partial(network_of, network), batch, k, rounds, device, setup)


def measure_model(
    factory: Callable[[], nn.Module],
    batch: Batch,
    k: int,
    rounds: int,
    device: torch.device,
    setup: Setup | None = None,
) -> RoundTimes:
    """``measure`` for any classifier and batch."""
    optim = OptimConfig(lr=0.01)
    plan, quiet = RoundConfig(k=k, reference="turns"), replace(setup or Setup(), verify=False)
    session = session_of(factory, batch[0].shape[1:], RHO, plan, optim, device=device, setup=quiet)
    times = RoundTimes()
    for number in range(rounds + 1):
        ours, subnets = our_round(session, batch, k)
        narrow = narrow_round(subnets, batch, k, optim)
        if number:
            times.ours.append(ours)
            times.narrow.append(narrow)
    return times


def our_round(session: SparseOffload, batch: Batch, k: int) -> tuple[list[float], list[nn.Module]]:
    """Seconds of every step of one round, and independent copies of its two subnets."""
    seen: dict[int, nn.Module] = {}

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        seen.setdefault(id(module), module)
        return loss_of(module, batch)

    seconds, copies = [], []
    for step in range(k):
        seconds.append(timed(lambda: session.step(partial(loss_fn, batch=batch))))
        if step == 0:
            copies = [independent_copy(module) for module in reversed(seen.values())]
    session.records()  # a trainer reads them now and then; nothing may pile up
    return seconds, copies


def narrow_round(networks: Sequence[nn.Module], batch: Batch, k: int, optim: OptimConfig) -> list[float]:
    """Seconds of every step of the narrow pair: train one, evaluate the other, in turns."""
    optimizers = [optimizer_factory(optim)(list(network.parameters())) for network in networks]

    def step(number: int) -> None:
        trained, other = number % 2, 1 - number % 2
        with torch.no_grad():
            loss_of(networks[other], batch)
        optimizers[trained].zero_grad(set_to_none=True)
        loss_of(networks[trained], batch).backward()
        optimizers[trained].step()

    return [timed(partial(step, number)) for number in range(k)]


def independent_copy(module: nn.Module) -> nn.Module:
    """A copy with ordinary parameters of its own memory, whatever those of ``module`` are views of."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone()) for p in module.parameters()}
    memo |= {id(b): b.detach().clone() for b in module.buffers()}
    return copy.deepcopy(module, memo).train()
