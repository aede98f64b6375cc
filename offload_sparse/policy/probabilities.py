"""Keep probabilities: the Euclidean projection onto their box and budget.

The feasible set is {s : lower <= s_i <= upper, sum_i cost_i s_i <= budget}. Its projection is clip(z) where
that fits the budget, else clip(z - v * cost) with the one multiplier v >= 0 that spends the budget exactly
(Zhou et al. 2021, Algorithm 1, with cost = 1; the multiplier is the one of the budget constraint in the KKT
conditions).
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 1e-12
"""Overspending, relative to the budget's scale, that is rounding and not a violation."""


def project(
    z: Tensor, budget: float, lower: float = 0.0, upper: float = 1.0, cost: Tensor | None = None
) -> Tensor:
    """The point nearest to ``z`` whose entries lie in [lower, upper] and that costs no more than the budget.

    Args:
        z: float64[C], any finite values.
        budget: largest value of sum(cost * s), in the unit of ``cost`` (atoms when that is None).
        lower: smallest entry allowed.
        upper: largest entry allowed.
        cost: float64[C], non-negative cost per atom; None: every atom costs 1.

    Returns:
        A new float64[C]. The budget is met to ``SLACK``; a second projection returns the same bits.

    Raises:
        ValueError: a shape, dtype or value is wrong, or no point meets the budget.
    """
    cost = torch.ones_like(z) if cost is None else cost
    _check(z, budget, lower, upper, cost)
    slack = SLACK * float(cost.sum()) * max(abs(lower), abs(upper), 1.0)
    cheapest = lower * float(cost.sum())
    if budget < cheapest - slack:
        raise ValueError(
            f"no probabilities meet the budget {budget:g}: the lower bound {lower:g} costs {cheapest:g}; "
            "raise the budget or lower the bound"
        )
    clipped = z.clamp(lower, upper)
    if float((cost * clipped).sum()) <= budget + slack:
        return clipped
    if budget <= cheapest:
        return torch.where(cost > 0, torch.full_like(z, lower), clipped)
    return _spend(z, budget, lower, upper, cost)


def _check(z: Tensor, budget: float, lower: float, upper: float, cost: Tensor) -> None:
    if z.dtype != torch.float64 or z.dim() != 1:
        raise ValueError(f"z is {z.dtype}{list(z.shape)}; give one float64 vector")
    if cost.dtype != torch.float64 or cost.shape != z.shape:
        raise ValueError(f"cost is {cost.dtype}{list(cost.shape)}; give float64{list(z.shape)}")
    if not bool(torch.isfinite(z).all()) or not bool(torch.isfinite(cost).all()) or budget != budget:
        raise ValueError("z, cost and budget must be finite numbers")
    if bool((cost < 0).any()):
        raise ValueError("cost has negative entries; give 0 or more per atom")
    if lower > upper:
        raise ValueError(f"the lower bound {lower:g} is above the upper bound {upper:g}")


def _spend(z: Tensor, budget: float, lower: float, upper: float, cost: Tensor) -> Tensor:
    """clip(z - v * cost) with the v > 0 that costs exactly ``budget``; the caller made sure there is one.

    The cost is a falling, piecewise linear function of v. Its corners are where an atom leaves the upper
    bound or reaches the lower one; a binary search over the sorted corners finds the piece that holds the
    budget, and on it v follows from the atoms strictly between the bounds (the active set).
    """
    payers = cost > 0
    corners = torch.cat([(z[payers] - upper) / cost[payers], (z[payers] - lower) / cost[payers]])
    corners = torch.cat([corners.new_zeros(1), corners[corners > 0].sort().values])
    low, high = 0, len(corners) - 1
    while high - low > 1:
        middle = (low + high) // 2
        spent = float((cost * (z - corners[middle] * cost).clamp(lower, upper)).sum())
        low, high = (middle, high) if spent > budget else (low, middle)
    start = z - 0.5 * (corners[low] + corners[high]) * cost
    active = payers & (start > lower) & (start < upper)
    s = start.clamp(lower, upper)
    # Twice: the second pass removes the rounding of the first where z is large against the bounds.
    for _ in range(2):
        excess = float((cost * s).sum()) - budget
        weight = float((cost[active] ** 2).sum())
        if weight > 0:
            s[active] = (s[active] - excess / weight * cost[active]).clamp(lower, upper)
    return s
