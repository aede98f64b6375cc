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

from offload_sparse.config import Reference
from offload_sparse.engine.pair import TAIL, SubnetPair
from offload_sparse.engine.sync import average
from offload_sparse.structure.subnet import batch_statistics

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
        difference: L(a) - L(b), or None when b was not evaluated.
        metrics: further scalars of the loss function.
    """

    loss: float
    difference: float | None
    metrics: dict[str, float]


class Round:
    """K steps on a pair that has been loaded.

    Args:
        pair: the loaded subnets.
        reference: the schedule of the reference loss.
        length: steps of the round.
        forward: how forward passes are run.
        world_size: number of ranks.
        first_step: optimizer steps of the run before this round, for messages.
    """

    def __init__(
        self,
        pair: SubnetPair,
        reference: Reference,
        length: int,
        forward: Forward,
        world_size: int,
        first_step: int,
    ) -> None:
        self.pair = pair
        self.reference = reference
        self.length = length
        self.steps = 0
        self._forward = forward
        self._world_size = world_size
        self._first_step = first_step
        self._tails: list[tuple[Tensor, bool, tuple[str, ...]]] = []

    def step(self, batch: Any, loss_fn: LossFunction, lr: float) -> Tensor:
        """One optimizer step of the subnet whose turn it is.

        Returns:
            its loss averaged over ranks, a scalar on the device (nothing waits for it here).
        """
        trained, evaluated = roles(self.reference, self.steps, self.pair.same)
        buffer = self.pair.reduce_buffer(trained)
        buffer.zero_()
        tail = buffer[-TAIL:]
        if evaluated is not None:
            module = self.pair.sides[evaluated].module
            tail[1 + evaluated] = self._forward.evaluated(module, batch, loss_fn)
        loss, metrics = self._forward.trained(self.pair.sides[trained].module, batch, loss_fn)
        loss.backward()
        self._fill_tail(tail, trained, loss.detach(), metrics, buffer[:-TAIL])
        average(buffer, self._world_size)
        self.pair.optimizer_step(trained, lr)
        if self._patch_needed():
            self.pair.patch(trained)
        self.steps += 1
        self._tails.append((tail.clone(), evaluated is not None, tuple(metrics)))
        return self._tails[-1][0][0]

    def flush(self) -> list[StepRecord]:
        """The records of the steps since the last flush, in order. Waits for the device.

        Raises:
            FloatingPointError: a loss or gradient is not finite on some rank; names the step.
        """
        if not self._tails:
            return []
        rows = torch.stack([tail for tail, _, _ in self._tails]).tolist()
        kinds = [(paired, names) for _, paired, names in self._tails]
        first = self._first_step + self.steps - len(rows)
        self._tails.clear()
        records = []
        for i, (row, (paired, names)) in enumerate(zip(rows, kinds, strict=True)):
            if not all(map(math.isfinite, row)):
                raise FloatingPointError(
                    f"the loss or gradient of step {first + i} is not finite (loss {row[0]}); lower "
                    "optim.lr, set optim.clip_norm, or use train.precision no"
                )
            metrics = dict(zip(names, row[_FIXED:], strict=False))
            records.append(StepRecord(row[0], row[1] - row[2] if paired else None, metrics))
        return records

    def _fill_tail(
        self, tail: Tensor, trained: int, loss: Tensor, metrics: Metrics, gradient: Tensor
    ) -> None:
        if len(metrics) > TAIL - _FIXED:
            raise ValueError(
                f"the loss function returns {len(metrics)} metrics; at most {TAIL - _FIXED} are carried"
            )
        tail[0] = loss
        tail[1 + trained] = loss
        tail[3] = gradient.sum()
        for i, value in enumerate(metrics.values()):
            tail[_FIXED + i] = value.detach()

    def _patch_needed(self) -> bool:
        """The other side is read again in this round or, when it was trained too, written back after it."""
        if self.pair.same or self.reference == "round_start" or self.length == 1:
            return False
        return self.reference == "turns" or self.steps + 1 < self.length
