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
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    Batch,
    batch_of,
    default_device,
    loss_of,
    median_ratio,
    network_of,
    session_of,
    timed,
)
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload

RHO = 0.25
PLAIN = Setup(verify=False)

_PLAN = (("vgg19", 10, 5), ("vgg19", 50, 3), ("resnet50", 10, 5), ("resnet50", 50, 3))
"""Network, steps per round, rounds that count."""

_QUICK = (("vgg19", 10, 3),)
_HEADER = ("network", "K", "round ms", "narrow ms", "ours/narrow")


def run(quick: bool) -> BenchResult:
    """VGG-19 and ResNet-50 at K = 10 and 50; ``quick`` takes VGG-19 at K = 10."""
    device = default_device()
    result = BenchResult({}, {}, _HEADER, [])
    for network, k, rounds in _QUICK if quick else _PLAN:
        ours, narrow = measure(partial(network_of, network), batch_of(network, device), k, rounds, device)
        key, ratio = f"round.{network}.k{k}", median_ratio(ours, narrow)
        result.ratios[f"{key}.vs_narrow"] = ratio
        result.raw[key] = {"ours_seconds": ours, "narrow_seconds": narrow}
        milliseconds = (f"{1000 * median(side):.0f}" for side in (ours, narrow))
        result.table.append([network, k, *milliseconds, f"{ratio:.3f}"])
    return result


def measure(
    factory: Callable[[], nn.Module],
    batch: Batch,
    k: int,
    rounds: int,
    device: torch.device,
    setup: Setup = PLAIN,
) -> tuple[list[float], list[float]]:
    """Seconds of rounds of ours and of the narrow pair, in turns, after one of each that does not count."""
    optim, plan = OptimConfig(lr=0.01), RoundConfig(k=k, reference="turns")
    batch = batch[0].to(setup.dtype), batch[1]
    session = session_of(factory, batch[0].shape[1:], RHO, plan, optim, device=device, setup=setup)
    ours, narrow = [], []
    for _ in range(rounds + 1):
        seconds, subnets = our_round(session, batch, k)
        ours.append(sum(seconds))
        narrow.append(sum(narrow_round(subnets, batch, k, optim)))
    return ours[1:], narrow[1:]


def our_round(session: SparseOffload, batch: Batch, k: int) -> tuple[list[float], list[nn.Module]]:
    """Seconds of every step of one round, and independent copies of its two subnets."""
    step = partial(session.step, partial(loss_of, batch=batch))
    seconds = [timed(step)]
    copies = [independent_copy(side.module) for side in session.transfers.pair.sides]
    seconds += [timed(step) for _ in range(k - 1)]
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
