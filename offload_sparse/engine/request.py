"""What a training is asked for: steps, and what stands beside them; how ranks wait for each other in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.engine.forward import Closure
from offload_sparse.engine.losses import LIVE
from offload_sparse.store.weight_store import Ranks


class Ask(Enum):
    """What the training is asked for beside a step."""

    OPEN = "open the next round, if none is open"
    FINISH = "end the round that is open, if one is"
    JOIN = "take part in the steps of the other ranks until all of them have asked for this"


Request = Sequence[Closure] | Ask


class Requests(ABC):
    """A training that runs as far as it is asked to."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._training: Generator[Tensor | None, Request, None] | None = None
        self._joined = False

    @abstractmethod
    def training(self) -> Generator[Tensor | None, Request, None]:
        """The training: each request is the closures of a step, or an ``Ask``; each answer a loss."""

    def _ask(self, request: Request) -> Tensor | None:
        """Send ``request`` to the training. After an error it can be asked again: nothing is lost but the
        step."""
        if self._training is None:
            self._training = self.training()
            next(self._training)
        try:
            return self._training.send(request)
        except BaseException:
            self._training = None
            raise

    def _join(self) -> None:
        """Wait until every rank is here, and take part in the steps that others make before; every rank calls
        it, after any number of steps."""
        self._joined = self.ranks.world_size == 1
        while not self._joined:
            self._ask(Ask.JOIN)

    def _all_joined(self, request: Request, losses: Tensor | None = None) -> bool:
        """Whether every rank waits for the others.

        Args:
            request: of this rank, between two rounds; every rank asks.
            losses: what rode behind the gradients, in a step of which this rank has no batch."""
        if losses is not None:
            self._joined = math.isnan(float(losses[LIVE]))
        elif self.ranks.world_size > 1:
            waiting = torch.tensor(float(request is Ask.JOIN))
            dist.all_reduce(waiting, dist.ReduceOp.MIN, group=self.ranks.host_group)
            self._joined = bool(waiting)
        return self._joined and request is Ask.JOIN
