"""Averaging a subnet's gradients over ranks: in one piece behind the backward pass, or in buckets during it.

    flat gradients   | p0 | p1 | p2 | p3 | p4 | p5 | losses |
    buckets          |<-- 2 -->|<-- 1 -->|<-- 0 -->|            backward passes fill them from the right

A bucket is sent as soon as its gradients are there, while the backward pass computes those of earlier layers.
Buckets go out in the same order on every rank. Which way is faster depends on the network and the wires, so
both are timed in the first steps and the faster one is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Reduction = Literal["auto", "single", "bucketed"]

BUCKET_BYTES = 8 << 20
"""Size of a bucket; a gradient that is larger has one of its own."""

_WARM_UP, _TRIALS = 2, 5
"""Steps that are not timed, and timed steps per way."""


class Averager:
    """Averages gradients over all ranks, the same way for the whole run once it is decided.

    Args:
        mode: ``single``, ``bucketed``, or ``auto``: time both, keep the faster.
        world_size: number of ranks; with one there is nothing to do.
        device: where the gradients are.
    """

    def __init__(self, mode: Reduction, world_size: int, device: torch.device) -> None:
        self.world_size = world_size
        self._device = device
        self._mode: Reduction = "single" if world_size == 1 else mode
        self._times: dict[str, list[float]] = {"single": [], "bucketed": []}
        self._steps = 0
        self._started = 0.0

    @property
    def mode(self) -> Reduction:
        """The way that is used; ``auto`` while both are being timed."""
        return self._mode

    def keep(self, mode: str) -> None:
        """Carry on as another run has decided; its ``auto`` means that it had not."""
        if mode in ("single", "bucketed") and self.world_size > 1:
            self._mode = "single" if mode == "single" else "bucketed"

    @property
    def bucketed(self) -> bool:
        """Whether the present step goes in buckets."""
        return self._trial == "bucketed" if self._mode == "auto" else self._mode == "bucketed"

    def start(self) -> None:
        """The backward pass begins."""
        if self._mode == "auto":
            self._synchronise()
            self._started = time.perf_counter()

    def finish(self) -> None:
        """The gradients of this step have been averaged."""
        if self._mode != "auto":
            return
        self._synchronise()
        if self._steps >= _WARM_UP:
            self._times[self._trial].append(time.perf_counter() - self._started)
        self._steps += 1
        if self._steps == _WARM_UP + 2 * _TRIALS:
            self._decide()

    @property
    def _trial(self) -> Literal["single", "bucketed"]:
        return "bucketed" if self._steps % 2 else "single"

    def _decide(self) -> None:
        medians = torch.tensor([median(self._times[way]) for way in ("single", "bucketed")])
        medians = medians.to(self._device)
        dist.all_reduce(medians, op=dist.ReduceOp.MAX)  # ranks must agree, whatever their clocks say
        single, bucketed = medians.tolist()
        self._mode = "bucketed" if bucketed < single else "single"

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Buckets:
    """The gradients of one subnet, sent piece by piece from hooks on its parameters.

    Args:
        parameters: in the order of the buffer, each with a gradient that is a view of it.
        gradients: flat gradients.
        averager: says, step by step, whether buckets are used.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], gradients: Tensor, averager: Averager) -> None:
        self._averager = averager
        self._parts: list[Tensor] = []
        self._missing: list[int] = []
        self._count: list[int] = []
        self._pending: list[dist.Work] = []
        self._bucket_of: list[int] = []
        self._sent = 0
        self._divide(parameters, gradients)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
            for parameter, bucket in zip(parameters, self._bucket_of, strict=True)
            if parameter.requires_grad
        ]
        self.begin()

    def begin(self) -> None:
        """Expect the gradients of a new backward pass."""
        self._missing = list(self._count)
        self._sent = 0

    def finish(self) -> None:
        """Send what has not been sent (gradients that this pass did not reach are zero) and wait for all."""
        while self._sent < len(self._parts):
            self._send()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        for part in self._parts:
            part.div_(self._averager.world_size)

    def _arrived(self, bucket: int) -> None:
        if not self._averager.bucketed:
            return
        self._missing[bucket] -= 1
        while self._sent < len(self._parts) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        work = dist.all_reduce(self._parts[self._sent], async_op=True)
        assert work is not None
        self._pending.append(work)
        self._sent += 1

    def _divide(self, parameters: Sequence[nn.Parameter], gradients: Tensor) -> None:
        """Cut the buffer from its end into buckets of at least ``BUCKET_BYTES``."""
        end = start = gradients.numel()
        bucket_of: list[int] = []
        count = 0
        for parameter in reversed(parameters):
            start -= parameter.numel()
            bucket_of.append(len(self._parts))
            count += parameter.requires_grad
            if (end - start) * gradients.element_size() >= BUCKET_BYTES:
                self._parts.append(gradients[start:end])
                self._count.append(count)
                end, count = start, 0
        assert start == 0, "the parameters fill the buffer"
        if end > 0:
            self._parts.append(gradients[:end])
            self._count.append(count)
        self._bucket_of = bucket_of[::-1]
