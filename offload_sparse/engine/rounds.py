"""One round: K steps on a pair of subnets, and the loss differences that the keep probabilities learn from.

    every_step    step 0: train a, evaluate b   step 1: train a, evaluate b   step 2: train a, evaluate b   …
    turns         step 0: train a, evaluate b   step 1: train b, evaluate a   step 2: train a, evaluate b   …
    round_start   step 0: train a, evaluate b   step 1: train a               step 2: train a               …

``every_step`` with K = 1 is Algorithm 1 of Zhou et al. (2021). With K > 1 it compares a trained subnet with
one that has stood still, so L(a) - L(b) falls below zero whatever the masks are; ``turns`` treats both alike
and costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_sparse.channels.subnet import batch_statistics
from offload_sparse.engine.config import Reference
from offload_sparse.engine.distributed import average, describe_fault, gathered, ranks_where
from offload_sparse.engine.reduction import Averager, Buckets
from offload_sparse.engine.subnet_pair import TAIL, SubnetPair
from offload_sparse.store.weight_store import BUFFERS

Metrics = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Metrics]]
"""(module, batch) -> mean loss of the batch, optionally with further scalars to be averaged over ranks."""

_FIXED = 4
"""Tail entries before the metrics: trained loss, L(a), L(b), sum of the gradient."""


@dataclass
class Forward:
    """How a forward pass is run.

    Attributes:
        autocast: context of forward passes.
        frozen_batch_norm: normalise with the running statistics.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    frozen_batch_norm: bool = False

    def train_mode(self, module: nn.Module) -> None:
        module.train()
        if self.frozen_batch_norm:
            for layer in module.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    def trained(self, module: nn.Module, batch: Any, loss_fn: LossFunction) -> tuple[Tensor, Metrics]:
        """Loss with its graph."""
        self.train_mode(module)
        with self.autocast():
            return _split(loss_fn(module, batch))

    @torch.no_grad()
    def evaluated(self, module: nn.Module, batch: Any, loss_fn: LossFunction) -> Tensor:
        """Loss under the same conditions as a trained pass, without a graph and without a trace."""
        self.train_mode(module)
        with self.autocast(), batch_statistics(module):
            return _split(loss_fn(module, batch))[0]


def _split(result: Tensor | tuple[Tensor, Metrics]) -> tuple[Tensor, Metrics]:
    return result if isinstance(result, tuple) else (result, {})


def roles(reference: Reference, step: int, same: bool) -> tuple[int, int | None]:
    """Which side is trained, and which is evaluated beside it, at a step of a round (0 is a, 1 is b)."""
    if same:
        return 0, None
    if reference == "turns":
        return step % 2, 1 - step % 2
    return 0, 1 if reference == "every_step" or step == 0 else None


@dataclass(frozen=True)
class StepRecord:
    """What one step measured, averaged over ranks.

    Attributes:
        loss: loss of the trained subnet.
        compared: L(a) and L(b), or None when b was not evaluated.
        metrics: further scalars of the loss function.
        losses: float64[2, ranks], L(a) and L(b) of every rank, if they were asked for.
        fault: what was not finite, with the step and the ranks; such a step has moved nothing. Empty
            otherwise.
    """

    loss: float
    compared: tuple[float, float] | None
    metrics: dict[str, float]
    fault: str = ""
    losses: Tensor | None = None

    @property
    def difference(self) -> float | None:
        """L(a) - L(b), or None when b was not evaluated."""
        return None if self.compared is None else self.compared[0] - self.compared[1]


class Round:
    """K steps on a pair that is filled and bound.

    Args:
        pair: the subnets.
        reference: the schedule of the reference loss.
        length: steps of the round.
        forward: how forward passes are run.
        averager: how gradients are averaged over ranks.
        first_step: optimizer steps of the run before this round.
        steps: steps of this round that have been made already (by a run that this one continues).
    """

    def __init__(
        self,
        pair: SubnetPair,
        reference: Reference,
        length: int,
        forward: Forward,
        averager: Averager,
        first_step: int,
        steps: int = 0,
    ) -> None:
        self.pair = pair
        self.reference = reference
        self.length = length
        self.steps = steps
        self._forward = forward
        self._averager = averager
        self._first_step = first_step
        self._tails: list[_Tail] = []
        self._buckets: dict[int, Buckets] = {}

    def step(self, batch: Any, loss_fn: LossFunction, lr: float) -> Tensor:
        """One optimizer step of the subnet whose turn it is; nothing moves if a loss or gradient of any rank
        is not finite.

        Returns:
            its loss averaged over ranks, a scalar on the device (nothing waits for it here).
        """
        trained, evaluated = roles(self.reference, self.steps, self.pair.same)
        side = self.pair.sides[trained]
        statistics = side.arrays[BUFFERS]
        before = statistics.clone()
        buffer = self.pair.reduce_buffer(trained)
        buffer.zero_()
        tail = buffer[-TAIL:]
        if evaluated is not None:
            module = self.pair.sides[evaluated].module
            tail[1 + evaluated] = self._forward.evaluated(module, batch, loss_fn)
        loss, metrics = self._forward.trained(side.module, batch, loss_fn)
        _fill_tail(tail, trained, loss.detach(), metrics)
        own = self._backward(trained, loss, buffer)
        found_inf = (~tail[:_FIXED].isfinite().all()).to(torch.float32)
        self.pair.optimizer_step(trained, lr, self._first_step + self.steps, found_inf)
        torch.where(found_inf > 0, before, statistics, out=statistics)
        if self._patch_needed():
            self.pair.patch(trained)
        self.steps += 1
        self._tails.append(_Tail(tail.clone(), own, evaluated is not None, tuple(metrics)))
        return self._tails[-1].averaged[0]

    def flush(self, per_rank: bool = False) -> list[StepRecord]:
        """The records of the steps since the last flush, in order. Waits for the device; every rank calls it
        at the same step.

        Args:
            per_rank: with the losses of every rank.
        """
        if not self._tails:
            return []
        tails, self._tails = self._tails, []
        first = self._first_step + self.steps - len(tails)
        rows = torch.stack([tail.averaged for tail in tails]).tolist()
        losses = None
        if per_rank:
            own = torch.stack([tail.own[1:3] for tail in tails])
            losses = gathered(own, self._averager.world_size).to("cpu", torch.float64)
        records = []
        for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
            metrics = dict(zip(tail.metrics, row[_FIXED:], strict=False))
            if all(map(math.isfinite, row[:_FIXED])):
                compared = (row[1], row[2]) if tail.paired else None
                measured = None if losses is None else losses[:, i].T
                records.append(StepRecord(row[0], compared, metrics, losses=measured))
                continue
            ranks = ranks_where(not bool(tail.own.isfinite().all()), self._averager.world_size)
            records.append(StepRecord(row[0], None, metrics, describe_fault(first + i, ranks, row[0])))
        return records

    def _backward(self, trained: int, loss: Tensor, buffer: Tensor) -> Tensor:
        """Gradients of ``loss``, averaged over ranks together with the losses behind them.

        Returns:
            this rank's own losses (and sum of the gradient, where that is known), before averaging.
        """
        averager, tail = self._averager, buffer[-TAIL:]
        averager.start()
        buckets = self._buckets_of(trained) if averager.bucketed else None
        loss.backward()
        gradients = buffer[:-TAIL]
        if buckets is None:
            tail[3] = gradients.sum()
        own = tail.clone()
        average(buffer if buckets is None else tail, averager.world_size)
        if buckets is not None:
            buckets.finish()
            tail[3] = gradients.sum()
        averager.finish()
        return own

    def _buckets_of(self, side: int) -> Buckets:
        if side not in self._buckets:
            parameters = list(self.pair.sides[side].module.parameters())
            self._buckets[side] = Buckets(parameters, self.pair.gradients(side), self._averager)
        self._buckets[side].begin()
        return self._buckets[side]

    def _patch_needed(self) -> bool:
        """The other side is read again in this round or, when it was trained too, carried on after it."""
        if self.pair.same or self.reference == "round_start" or self.length == 1:
            return False
        return self.reference == "turns" or self.steps + 1 < self.length


@dataclass(frozen=True)
class _Tail:
    """What rode behind the gradients of one step.

    Attributes:
        averaged: float[TAIL], over all ranks.
        own: float[TAIL], of this rank.
        paired: both subnets were run.
        metrics: names of the scalars from entry ``_FIXED`` on.
    """

    averaged: Tensor
    own: Tensor
    paired: bool
    metrics: tuple[str, ...]


def _fill_tail(tail: Tensor, trained: int, loss: Tensor, metrics: Metrics) -> None:
    if len(metrics) > TAIL - _FIXED:
        raise ValueError(
            f"the loss function returns {len(metrics)} metrics; at most {TAIL - _FIXED} are carried"
        )
    tail[0] = loss
    tail[1 + trained] = loss
    for i, value in enumerate(metrics.values()):
        tail[_FIXED + i] = value.detach()
