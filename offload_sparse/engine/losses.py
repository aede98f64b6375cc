"""What a step measures: the losses of both subnets and further scalars, which ride behind the gradients.

| gradients … | loss | L(a) | L(b) | sum of the gradients | ranks that had a batch | metrics by name … |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sparse.engine.distributed import describe_fault, gathered, ranks_where
from offload_sparse.engine.forward import MOST_METRICS, Metrics

LOSS, LOSS_A, GRADIENT_SUM, LIVE, METRICS = 0, 1, 3, 4, 5
TAIL = METRICS + MOST_METRICS
"""Scalars behind the gradients."""

MOST_RECORDS = 100_000
"""Steps whose records wait for a loop that may never ask for them."""


class Measured:
    """The scalars of one step of one rank, before they ride: means over so many micro-batches (``passes``),
    of the type and device of ``like``.

    Attributes:
        values: by place; the others are zero.
        names: of the metrics."""

    def __init__(self, passes: int, like: Tensor) -> None:
        self._passes, self._like = passes, like
        self.values: dict[int, Tensor] = {}
        self.names: tuple[str, ...] = ()

    def add(self, place: int, value: Tensor) -> None:
        part = share(value.detach().to(self._like), self._passes)
        known = self.values.get(place)
        self.values[place] = part if known is None else known + part

    def add_trained(self, side: int, loss: Tensor, metrics: Metrics) -> None:
        """What a micro-batch has measured of the subnet that is trained. Raises ValueError: the metrics are
        not those of the micro-batches before."""
        names = tuple(metrics)
        if LOSS in self.values and names != self.names:
            first, other = (", ".join(each) or "none" for each in (self.names, names))
            raise ValueError(f"parts of a batch have different metrics ({first}; {other}); return the same")
        self.names = names
        for place, value in ((LOSS, loss), *enumerate(metrics.values(), METRICS)):
            self.add(place, value)
        self.values[LOSS_A + side] = self.values[LOSS]


@dataclass(frozen=True)
class StepRecord:
    """What one step measured, averaged over ranks.

    Attributes:
        compared: L(a) and L(b), or None when b was not evaluated.
        losses: float64[2, ranks], L(a) and L(b) of every rank, if they were asked for.
        fault: what was not finite, with the step and the ranks; such a step has moved nothing. Empty
            otherwise."""

    loss: float
    compared: tuple[float, float] | None
    metrics: dict[str, float]
    fault: str = ""
    losses: Tensor | None = None

    @property
    def difference(self) -> float | None:
        """L(a) - L(b), or None when b was not evaluated."""
        return None if self.compared is None else self.compared[0] - self.compared[1]


class Losses:
    """What rode behind the gradients of the last steps, on the device until it is read; scalars of the type
    and device of ``like``."""

    def __init__(self, world_size: int, like: Tensor) -> None:
        self._world_size = world_size
        self._zeros = like.new_zeros(LIVE)
        self._steps: list[tuple[Tensor, Tensor, bool, tuple[str, ...]]] = []

    def add(self, averaged: Tensor, own: Tensor, compared: bool, metrics: tuple[str, ...]) -> Tensor:
        """Keep float[TAIL] of a step, averaged over ranks and of this rank; returns the mean loss."""
        self._steps.append((averaged, own, compared, metrics))
        return averaged[LOSS]

    def not_finite(self, averaged: Tensor) -> Tensor:
        """bool scalar on the device: a loss or gradient of a step is not finite on some rank."""
        return torch.dot(averaged[:LIVE], self._zeros) != 0

    def clear(self) -> None:
        """Forget the steps that have not been read."""
        self._steps.clear()

    def read(
        self, steps_done: int, per_rank: bool = False, scaled: bool = False, own_subnets: bool = False
    ) -> list[StepRecord]:
        """The records of the steps since the last time, in order. Waits for the device; every rank calls it
        at the same step.

        Args:
            per_rank: with the losses of every rank.
            scaled: losses are scaled, so that a gradient that is not finite is no fault.
            own_subnets: every rank has trained a subnet of its own; the first is compared with all others."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        rows = torch.stack([step[0] for step in steps]).tolist()
        ranks = None
        if per_rank:
            own = torch.stack([step[1][LOSS_A : LIVE + 1] for step in steps])
            ranks = gathered(own, self._world_size).to("cpu", torch.float64)
        records = []
        for i, (row, (_, own, compared, names)) in enumerate(zip(rows, steps, strict=True)):
            metrics = dict(zip(names, row[METRICS:], strict=False))
            if not all(map(math.isfinite, row[: GRADIENT_SUM if scaled else LIVE])):
                where = ranks_where(not bool(own.isfinite().all()), self._world_size)
                fault = describe_fault(steps_done - len(steps) + i, where, row[LOSS])
                records.append(StepRecord(row[LOSS], None, metrics, fault))
                continue
            whole = ranks is None or bool(ranks[:, i, LIVE - LOSS_A].all())  # every rank had a batch
            pair = (row[LOSS_A], row[LOSS_A + 1]) if compared and whole else None
            of_ranks = None if ranks is None else ranks[:, i, :2].T
            if own_subnets and of_ranks is not None and whole:
                pair = float(of_ranks[0, 0]), float(of_ranks[0, 1:].mean())
            records.append(StepRecord(row[LOSS], pair, metrics, losses=of_ranks))
        return records


def share(value: Tensor, passes: int) -> Tensor:
    """What one of ``passes`` micro-batches adds to a mean."""
    return value if passes == 1 else value / passes
