"""What a training is asked for: steps, and what stands beside them; how ranks wait for each other in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from enum import Enum

from torch import Tensor

from offload_sparse.engine.distributed import everyones, require_equal
from offload_sparse.engine.forward import Closure
from offload_sparse.engine.losses import LIVE
from offload_sparse.engine.subnet_pair import SubnetPair
from offload_sparse.engine.transfers import Transfers
from offload_sparse.store.weight_store import Ranks


class Ask(Enum):
    """What the training is asked for beside a step."""

    OPEN = "open the next round, if none is open"
    FINISH = "end the round that is open, if one is"
    JOIN = "take part in the steps of the other ranks until all of them have asked for this"


Request = Sequence[Closure] | Ask


class Requests(ABC):
    """A training that runs as far as it is asked to.

    Attributes:
        live: a number for each step of the open round that this rank had a batch for; where ranks share their
            steps, it tells the settings of the optimizer apart."""

    transfers: Transfers
    pair: SubnetPair | None
    local: bool
    asked_freeze: int

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.live: list[int] = []
        self._training: Generator[Tensor | None, Request, None] | None = None
        self._joined = False
        self._compared = False  # settings, since ranks last waited for each other

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
            if self.pair is not None and not self._compared and request not in (Ask.OPEN, Ask.FINISH):
                self._meet(request)
            return self._training.send(request)
        except BaseException:
            self._training = None
            raise

    def join(self, call: str) -> None:
        """Wait until every rank is here, and take part in the steps that others make before; every rank calls
        it, after any number of steps. Raises ValueError (on every rank): for different things."""
        self._joined = self.ranks.world_size == 1
        while not self._joined:
            self._ask(Ask.JOIN)
        calls = everyones({"the call of the session": call}, self.ranks.world_size, self.ranks.host_group)
        advice = "every rank makes the same ones in the same order, one that has no batch any more, too"
        require_equal(dict(enumerate(calls)), advice)
        self._take_over()
        self._compared = False

    def _take_over(self) -> None:
        """Bring the subnets of a rank that had fewer batches to where the others have trained them: it does
        not make these steps itself, since it has neither their learning rates nor other settings. Every rank
        calls it. Raises ValueError (on every rank): steps were made with different settings."""
        if self.pair is None or self.local or self.ranks.world_size == 1:
            return
        every = everyones(self.live, self.ranks.world_size, self.ranks.host_group)
        longest = max(every, key=len)
        ahead = every.index(longest)
        if odd := [rank for rank, live in enumerate(every) if live != longest[: len(live)]]:
            raise ValueError(
                f"ranks {ahead} and {odd[0]} have made a step with different settings of the optimizer: one "
                "that has fewer batches begins its next epoch earlier; change settings where all have met, "
                "behind session.evaluation or session.state_dict, or by session.steps_done"
            )
        if min(map(len, every)) < len(longest):
            self.pair.take_over(ahead, self.ranks)
        self.live = longest

    def _all_joined(self, request: Request, losses: Tensor | None = None) -> bool:
        """Whether every rank waits for the others.

        Args:
            request: of this rank, between two rounds; every rank asks.
            losses: what rode behind the gradients, in a step of which this rank has no batch."""
        if losses is not None:
            self._joined = math.isnan(float(losses[LIVE]))
        else:
            self._meet(request)
        return self._joined and request is Ask.JOIN

    def _meet(self, request: Request) -> None:
        """Learn whether every rank waits for the others, and whether one has asked to end the search. Raises
        ValueError (on every rank): those that make a step would make it with different settings."""
        if self.ranks.world_size == 1:
            return
        own = None if isinstance(request, Ask) else self.transfers.optimizer.settings()
        word = request is Ask.JOIN, self.asked_freeze, own
        every = everyones(word, self.ranks.world_size, self.ranks.host_group)
        self._joined = all(waits for waits, *_ in every)
        self.asked_freeze = min(asked for _, asked, _ in every)
        live = {rank: settings for rank, (*_, settings) in enumerate(every) if settings is not None}
        self._compared = bool(live)
        if live:
            require_equal(
                live,
                "one that had fewer batches has stepped its scheduler less often: before session.step, "
                "let it catch up (while scheduler.last_epoch < session.steps_done: scheduler.step())",
            )
