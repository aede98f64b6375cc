"""The control variate of ``rloo_cv`` and ``disarm_cv``: what channels of each layer are worth.

Estimates of single atoms are far noisier than large, and a control variate that is as noisy as they are adds
more variance than it takes away. So it has one number per group, and comes from a regression of past loss
differences on the differences of widths, L(m) - L(m') ≈ Σ_g a_g (|m_g| - |m'_g|), with a ridge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group

_RIDGE = 0.1
"""Of the regression, relative to the mean square of a difference of widths."""


class ControlVariate:
    """a, the same for all atoms of a group, from exponentially forgotten comparisons of earlier rounds.

    It must not know the masks that it is used with. Those of a round are drawn before the losses of the round
    are known, so the comparisons of a round are set aside and join the others when the next one begins.

    Args:
        groups: the groups of the atoms.
        decay: per round, in [0, 1).
    """

    def __init__(self, groups: Sequence[Group], decay: float) -> None:
        self._groups, self._decay = groups, decay
        size = len(groups)
        self._known = torch.zeros(
            size, size + 1, dtype=torch.float64
        )  # normal equations: matrix | right side
        self._pending = torch.zeros_like(self._known)
        self._round = torch.tensor(-1)

    def of_round(self, round: int) -> Tensor:
        """a for the masks of ``round``, float64[C]."""
        if round != int(self._round):
            self._known = self._decay * self._known + self._pending
            self._pending = torch.zeros_like(self._pending)
            self._round = torch.tensor(round)
        return _solved(self._known, self._groups)

    def compared(self, difference: float, step: Tensor) -> None:
        """Set a comparison of the present round aside: L(m) - L(m') and m - m' (float64[C])."""
        self._pending = self._pending + _equations(torch.tensor([[difference]]), step[None], self._groups)

    def state(self) -> dict[str, Tensor]:
        """Tensors that are never changed in place."""
        return {"known": self._known, "pending": self._pending, "round": self._round}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Carry on from ``state()``."""
        self._known, self._pending = state["known"].clone(), state["pending"].clone()
        self._round = state["round"].clone()


def regressed(differences: Tensor, steps: Tensor, groups: Sequence[Group]) -> Tensor:
    """a, float64[C], of comparisons: L(m) - L(m') as float64[n, 1], m - m' as float64[n, C]."""
    return _solved(_equations(differences, steps, groups), groups)


def _equations(differences: Tensor, steps: Tensor, groups: Sequence[Group]) -> Tensor:
    """float64[G, G + 1]: the normal equations of the regression."""
    widths = torch.stack([steps[:, group.start : group.stop].sum(1) for group in groups], dim=1)
    return widths.T @ torch.cat([widths, differences.to(widths.dtype)], dim=1)


def _solved(equations: Tensor, groups: Sequence[Group]) -> Tensor:
    matrix, right = equations[:, :-1], equations[:, -1]
    ridge = _RIDGE * matrix.trace() / len(groups)
    if ridge <= 0:
        return torch.zeros(groups[-1].stop, dtype=torch.float64)
    values = torch.linalg.solve(matrix + ridge * torch.eye(len(groups), dtype=torch.float64), right)
    return torch.cat([values[i].expand(group.size) for i, group in enumerate(groups)])
