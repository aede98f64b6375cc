"""The control variate of ``rloo_cv`` and ``disarm_cv``: an average of past estimates, fixed per round.

Estimates of single atoms are far noisier than large, and an average that is as noisy as they are adds more
variance than it takes away. The average over a group is not: it says what a channel of this layer is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offload_sparse.structure.channel_map import Group


class ControlVariate:
    """a, an exponential average of the estimates of earlier rounds, the same for all atoms of a group.

    It must not know the masks that it is used with. Those of a round are drawn before the losses of the round
    are known, so the estimates of a round are set aside and join the average when the next one begins.

    Args:
        groups: the groups of the atoms.
        decay: of the average, in [0, 1).
    """

    def __init__(self, groups: Sequence[Group], decay: float) -> None:
        self._groups, self._decay = groups, decay
        count = groups[-1].stop
        self._value = torch.zeros(count, dtype=torch.float64)
        self._pending = torch.zeros(count, dtype=torch.float64)
        self._counts = torch.tensor([-1, 0])  # the round of the pending estimates, and how many there are

    def of_round(self, round: int) -> Tensor:
        """a for the masks of ``round``, float64[C]."""
        last, estimates = self._counts.tolist()
        if round != last:
            if estimates:
                mean = pooled(self._pending / estimates, self._groups)
                self._value = self._decay * self._value + (1 - self._decay) * mean
            self._pending = torch.zeros_like(self._pending)
            self._counts = torch.tensor([round, 0])
        return self._value

    def estimated(self, g: Tensor) -> None:
        """Set an estimate of the present round aside."""
        self._pending = self._pending + g
        self._counts = self._counts + torch.tensor([0, 1])

    def state(self) -> dict[str, Tensor]:
        """Tensors that are never changed in place."""
        return {"value": self._value, "pending": self._pending, "counts": self._counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Carry on from ``state()``."""
        self._value, self._pending = state["value"].clone(), state["pending"].clone()
        self._counts = state["counts"].clone()


def pooled(g: Tensor, groups: Sequence[Group]) -> Tensor:
    """The mean of every group at all of its atoms: float64[C]."""
    return torch.cat([g[group.start : group.stop].mean().expand(group.size) for group in groups])
