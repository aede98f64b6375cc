"""Estimators of the gradient of E_{m ~ p(m|s)} L(m) with respect to s, from the losses of two masks.

    pge         L(m) (m - s) / (s(1-s))                                     m' is not used
    vr_pge      (L(m) - L(m')) (m - s) / (s(1-s))                           m' is another draw (the paper)
    rloo        ½ (L(m) - L(m')) (m - m') / (s(1-s))                        m' is another draw
    disarm_cv   ½ (L(m) - L(m') - a·(m - m')) (m - m') / min(s, 1-s) + a    m = 1[u > 1 - s], m' = 1[u < s]

All are unbiased: averaged over the masks that they are made for, they give the gradient exactly. All are O(C)
and need no backward pass. The preconditioner H = diag(s(1-s))^α is applied afterwards (Zhou et al. 2021,
equations 4 and 5). No s is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import ALPHA

_DECAY = 0.95
"""Of the comparisons that a control variate comes from, per round."""

_RIDGE = 0.1
"""Of their regression, relative to the mean square of a difference of widths."""


@dataclass(frozen=True)
class Comparison:
    """Two masks and what they have cost; any number at once where there are leading dimensions.

    Attributes:
        loss, reference_loss: L(m) and L(m'), numbers or float64[..., 1].
        m, m_ref: bool[..., C] or of numbers, m and m'.
        s: float64[C].
        mean: float64[C], E[m]; None means s, which it is unless widths are fixed.
        control: float64[C], the control variate a, fixed before the masks were drawn; None means 0."""

    loss: float | Tensor
    reference_loss: float | Tensor
    m: Tensor
    m_ref: Tensor
    s: Tensor
    mean: Tensor | None = None
    control: Tensor | None = None

    @property
    def difference(self) -> float | Tensor:
        """L(m) - L(m')."""
        return self.loss - self.reference_loss

    @property
    def step(self) -> Tensor:
        """m - m', float64[..., C]."""
        return self.m.to(self.s.dtype) - self.m_ref.to(self.s.dtype)

    @property
    def score(self) -> Tensor:
        """(m - E[m]) / (s(1-s)), float64[..., C]: the gradient of ln p(m|s).

        With fixed widths p is the conditional Bernoulli distribution, an exponential family in the log-odds
        of s, whose score there is m - E[m]."""
        mean = self.s if self.mean is None else self.mean
        return (self.m.to(self.s.dtype) - mean) / _variance(self.s)


def pge(pair: Comparison) -> Tensor:
    """The policy gradient itself (Williams 1992); its variance is that of the loss's level."""
    return pair.loss * pair.score


def vr_pge(pair: Comparison) -> Tensor:
    """The paper's variance reduced policy gradient (Zhou et al. 2021, VR-PGE): m' enters through the loss
    difference only."""
    return pair.difference * pair.score


def rloo(pair: Comparison) -> Tensor:
    """REINFORCE with the other sample as baseline (Kool et al. 2019), two samples.

    Symmetric in the two masks, with about half the second moment of ``vr_pge``. E[m] cancels, so it serves
    fixed widths as it stands."""
    return 0.5 * pair.difference * (pair.step / _variance(pair.s))


def disarm_cv(pair: Comparison) -> Tensor:
    """DisARM (Dong et al. 2020), for antithetic masks, with a linear control variate: what is subtracted has
    the expectation a, which is added again."""
    difference, step = pair.difference, pair.step
    if pair.control is not None:
        difference = difference - (step * pair.control).sum(-1, keepdim=step.dim() > 1)
    g = 0.5 * difference * (step / torch.minimum(pair.s, 1 - pair.s))
    return g if pair.control is None else g + pair.control


ESTIMATORS: Mapping[str, Callable[[Comparison], Tensor]] = {
    "pge": pge,
    "vr_pge": vr_pge,
    "rloo": rloo,
    "disarm_cv": disarm_cv,
}
"""Comparison -> float64[..., C], by the name that the configuration gives them."""

CONTROLLED = "disarm_cv"
"""The estimator that needs antithetic masks, and uses a control variate."""


def leave_one_out(losses: Tensor, masks: Tensor, s: Tensor) -> Tensor:
    """1/(R-1) Σ_r (L_r - mean L) (m_r - s) / (s(1-s)), float64[C], of R >= 2 independent samples, losses
    float64[R] and masks bool[R, C]: REINFORCE with the mean of the other samples as baseline (Kool et al.
    2019). Two samples give ``rloo``; more of them lower the variance."""
    weights = (losses - losses.mean()) / (len(losses) - 1)
    return weights @ ((masks.to(s.dtype) - s) / _variance(s))


def apart_factor(s: Tensor, ranks: int) -> Tensor:
    """By what masks drawn apart (``Bernoulli.draw_apart``) make ``leave_one_out`` too large, float64[C].

    Rs rounded down or up of R masks keep an atom, with the variance v = {Rs}(1 - {Rs}). So two of them have
    the mean correlation c = (v / (R s(1-s)) - 1) / (R - 1), and since atoms are independent of each other,
    the baseline of a mask takes c times the gradient away: what is left is 1 - c times it. Where s <= 1/R
    masks are disjoint and 1 - c = 1 / (1-s); for R = 2 that is ``disarm_cv`` without its control.
    """
    share = (ranks * s) % 1.0
    return (ranks - share * (1 - share) / (ranks * s * (1 - s))) / (ranks - 1)


def paired_losses(first: Tensor, references: Tensor) -> Tensor:
    """Losses of R + 1 masks measured on R ranks (float64[R], L(m) on each, and L(m_i) on rank i), freed of
    what ranks' own images add: float64[R + 1], of m, m_1, …, m_R.

    Rank i measures the common mask m on its images, and its reference mask m_i on the same ones. Taking the
    difference on each rank and adding the mean loss of m leaves ``leave_one_out`` unbiased: what the images
    add to the references sums to zero, and the loss of m is independent of the masks m_i."""
    mean = first.mean()
    return torch.cat([mean[None], references - first + mean])


def precondition(g: Tensor, s: Tensor) -> Tensor:
    """H g with H = diag(s(1-s))^α (Zhou et al. 2021, equation 4): float64[C]."""
    return _variance(s) ** ALPHA * g


def preconditioned_rloo(
    difference: float, step: NDArray[np.float64], s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``precondition`` of ``rloo``, of some atoms; ``step`` is their m - m'."""
    return 0.5 * difference * step * (s * (1 - s)) ** (ALPHA - 1)


class ControlVariate:
    """a of ``disarm_cv``: what a channel of each group is worth, by comparisons of earlier rounds.

    Estimates of single atoms are far noisier than large, and a control variate that is as noisy as they are
    adds more variance than it takes away. So it has one number per group, from a ridge regression of past
    loss differences on differences of widths, L(m) - L(m') ≈ Σ_g a_g (|m_g| - |m'_g|). It must not know the
    masks that it is used with: the comparisons of a round join the others when the next one begins."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        size = len(groups)
        # normal equations: matrix | right side
        self._known = torch.zeros(size, size + 1, dtype=torch.float64)
        self._pending = torch.zeros_like(self._known)
        self._round = torch.tensor(-1)

    def of_round(self, round: int) -> Tensor:
        """a for the masks of ``round``, float64[C]."""
        if round != int(self._round):
            self._known = _DECAY * self._known + self._pending
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
        self._known, self._pending, self._round = (state[n].clone() for n in ("known", "pending", "round"))


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


def _variance(s: Tensor) -> Tensor:
    return s * (1 - s)
