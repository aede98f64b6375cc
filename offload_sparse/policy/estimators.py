"""Estimators of the gradient of E_{m ~ Bern(s)} L(m) with respect to s, from the losses of two masks.

All are unbiased: averaged over independent m, m_ref ~ Bern(s) they give the gradient exactly. All are O(C)
and need no backward pass. The preconditioner H = diag(s(1-s))^alpha is applied afterwards (Zhou et al. 2021,
equations 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[float | Tensor, Tensor, Tensor, Tensor], Tensor]
"""(loss_difference = L(m) - L(m_ref), m: bool[C], m_ref: bool[C], s: float64[C]) -> float64[C]."""


def vr_pge(loss_difference: float | Tensor, m: Tensor, m_ref: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001
    """(L(m) - L(m')) (m - s) / (s(1-s)): the paper's variance reduced policy gradient (Zhou et al. 2021,
    VR-PGE).

    ``m_ref`` enters through the loss difference only. At s in {0, 1} the score, and with it the estimate, is
    0.
    """
    return loss_difference * _over_variance(m.to(s.dtype) - s, s)


def rloo(loss_difference: float | Tensor, m: Tensor, m_ref: Tensor, s: Tensor) -> Tensor:
    """½ (L(m) - L(m')) (m - m') / (s(1-s)): REINFORCE with the other sample as baseline (Kool et al. 2019),
    two samples.

    Symmetric in the two masks, with about half the second moment of ``vr_pge``. At s in {0, 1} the estimate
    is 0.
    """
    return 0.5 * loss_difference * _over_variance(m.to(s.dtype) - m_ref.to(s.dtype), s)


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
    variance = s * (1 - s)
    certain = variance <= 0
    return torch.where(certain, 0.0, numerator / torch.where(certain, 1.0, variance))


ESTIMATORS: dict[str, Estimator] = {"vr_pge": vr_pge, "rloo": rloo}
"""Estimators by the name that the configuration gives them."""
