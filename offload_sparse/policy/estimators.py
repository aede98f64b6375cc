"""Estimators of the gradient of E_{m ~ p(m|s)} L(m) with respect to s, from the losses of two masks.

All are unbiased: averaged over the masks that they are made for, they give the gradient exactly. All are O(C)
and need no backward pass. The preconditioner H = diag(s(1-s))^alpha is applied afterwards (Zhou et al. 2021,
equations 4 and 5).

    masks          estimators                      m' beside m ~ p(m|s)
    independent    pge vr_pge rloo rloo_cv         another draw
    antithetic     disarm disarm_cv                m = 1[u > 1 - s], m' = 1[u < s] of the same uniforms u
    flipped        bitflip                         m with one atom, drawn uniformly, the other way round
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["independent", "antithetic", "flipped"]
"""How the reference mask comes about."""


@dataclass(frozen=True)
class Comparison:
    """Two masks and what they have cost; any number at once where there are leading dimensions.

    Attributes:
        loss: L(m), a number or float64[..., 1].
        reference_loss: L(m').
        m: bool[..., C].
        m_ref: bool[..., C], m'.
        s: float64[C].
        mean: float64[C], E[m]; None means s, which it is unless widths are fixed.
        control: float64[C], the control variate a, fixed before the masks were drawn; None means 0.
    """

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
        """(m - E[m]) / (s(1-s)), float64[..., C]: the gradient of ln p(m|s); 0 where s is 0 or 1.

        With fixed widths p is the conditional Bernoulli distribution, an exponential family in the log-odds
        of s, whose score there is m - E[m].
        """
        return _over_variance(self.m.to(self.s.dtype) - (self.s if self.mean is None else self.mean), self.s)

    @property
    def uncontrolled(self) -> float | Tensor:
        """L(m) - L(m') - a·(m - m'): what a linear model of the loss leaves unexplained."""
        if self.control is None:
            return self.difference
        return self.difference - (self.step * self.control).sum(-1, keepdim=self.step.dim() > 1)


Estimator = Callable[[Comparison], Tensor]
"""Comparison -> float64[..., C]."""


def pge(pair: Comparison) -> Tensor:
    """L(m) (m - s) / (s(1-s)): the policy gradient itself (Williams 1992); its variance is that of the loss's
    level."""
    return pair.loss * pair.score


def vr_pge(pair: Comparison) -> Tensor:
    """(L(m) - L(m')) (m - s) / (s(1-s)): the paper's variance reduced policy gradient (Zhou et al. 2021,
    VR-PGE).

    m' enters through the loss difference only. At s in {0, 1} the score, and with it the estimate, is 0.
    """
    return pair.difference * pair.score


def rloo(pair: Comparison) -> Tensor:
    """½ (L(m) - L(m')) (m - m') / (s(1-s)): REINFORCE with the other sample as baseline (Kool et al. 2019),
    two samples.

    Symmetric in the two masks, with about half the second moment of ``vr_pge``. E[m] cancels, so it serves
    fixed widths as it stands. At s in {0, 1} the estimate is 0.
    """
    return 0.5 * pair.difference * _over_variance(pair.step, pair.s)


def rloo_cv(pair: Comparison) -> Tensor:
    """½ (L(m) - L(m') - a·(m - m')) (m - m') / (s(1-s)) + a: ``rloo`` with a linear control variate.

    The subtracted term has the expectation a. At s in {0, 1} the estimate is 0.
    """
    return _with_control(0.5 * pair.uncontrolled * _over_variance(pair.step, pair.s), pair)


def disarm(pair: Comparison) -> Tensor:
    """½ (L(m) - L(m')) (m - m') / min(s, 1-s) of antithetic masks (Dong et al. 2020, DisARM).

    At s in {0, 1} the estimate is 0.
    """
    return 0.5 * pair.difference * _over_smaller(pair.step, pair.s)


def disarm_cv(pair: Comparison) -> Tensor:
    """½ (L(m) - L(m') - a·(m - m')) (m - m') / min(s, 1-s) + a: ``disarm`` with a linear control variate."""
    return _with_control(0.5 * pair.uncontrolled * _over_smaller(pair.step, pair.s), pair)


def bitflip(pair: Comparison) -> Tensor:
    """C (L(m | m_i = 1) - L(m | m_i = 0)) for the one atom i in which the masks differ, 0 for all others.

    Bounded however near s is to 0 or 1.
    """
    return len(pair.s) * pair.difference * pair.step


def leave_one_out(losses: Tensor, masks: Tensor, s: Tensor) -> Tensor:
    """1/(R-1) sum_r (L_r - mean L) (m_r - s) / (s(1-s)): REINFORCE with the mean of the other samples as
    baseline (Kool et al. 2019), R independent samples.

    Two samples give ``rloo``; more of them lower the variance.

    Args:
        losses: float64[R], R >= 2.
        masks: bool[R, C].
        s: float64[C].

    Returns:
        float64[C]; 0 where s is 0 or 1.
    """
    weights = (losses - losses.mean()) / (len(losses) - 1)
    return weights @ _over_variance(masks.to(s.dtype) - s, s)


def paired_losses(first: Tensor, references: Tensor) -> Tensor:
    """Losses of R + 1 masks measured on R ranks, freed of what ranks' own images add.

    Rank i measures the common mask m on its images, and its reference mask m_i on the same ones. Taking the
    difference on each rank and adding the mean loss of m leaves ``leave_one_out`` unbiased: what the images
    add to the references sums to zero, and the loss of m is independent of the masks m_i.

    Args:
        first: float64[R], L(m) on each rank.
        references: float64[R], L(m_i) on rank i.

    Returns:
        float64[R + 1], of m, m_1, …, m_R.
    """
    mean = first.mean()
    return torch.cat([mean[None], references - first + mean])


def precondition(g: Tensor, s: Tensor, alpha: float) -> Tensor:
    """H g with H = diag(s(1-s))^alpha (Zhou et al. 2021, equation 4): float64[C]."""
    return (s * (1 - s)) ** alpha * g


def _over_variance(numerator: Tensor, s: Tensor) -> Tensor:
    return _ratio(numerator, s * (1 - s))


def _over_smaller(numerator: Tensor, s: Tensor) -> Tensor:
    return _ratio(numerator, torch.minimum(s, 1 - s))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    certain = denominator <= 0
    return torch.where(certain, 0.0, numerator / torch.where(certain, 1.0, denominator))


def _with_control(g: Tensor, pair: Comparison) -> Tensor:
    if pair.control is None:
        return g
    return g + torch.where((pair.s <= 0) | (pair.s >= 1), 0.0, pair.control)


ESTIMATORS: Mapping[str, Estimator] = {
    "pge": pge,
    "vr_pge": vr_pge,
    "rloo": rloo,
    "disarm": disarm,
    "rloo_cv": rloo_cv,
    "disarm_cv": disarm_cv,
    "bitflip": bitflip,
}
"""Estimators by the name that the configuration gives them."""

CONTROLLED = ("rloo_cv", "disarm_cv")
"""Estimators that use a control variate."""


def pairing(name: str) -> Pairing:
    """How the two masks of the estimator ``name`` are drawn."""
    if name in ("disarm", "disarm_cv"):
        return "antithetic"
    return "flipped" if name == "bitflip" else "independent"
