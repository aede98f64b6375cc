"""The budget of the keep probabilities: atoms, parameters or FLOPs.

The paper's budget counts atoms: sum(s) <= rho · C. That of parameters or FLOPs is a sum of products of
expected widths, f(s) <= rho · f(1). It is linearised: f(t) + f'(t)·(s - t) <= rho · f(1) is a budget with a
cost per atom, whose projection is known. Linearised again where that ends, a few such steps end at the
nearest point: s = clip(z - v f'(s)) with the one v >= 0 that spends the budget.

The projection onto {lower <= s_i <= upper, Σ cost_i s_i <= budget} is clip(z) where that fits the budget,
else clip(z - v · cost) with the one multiplier v >= 0 that spends the budget exactly (Zhou et al. 2021,
Algorithm 1, with cost = 1; the multiplier is the one of the budget constraint in the KKT conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.policy.config import BudgetName, PolicyConfig
from offload_sparse.policy.widths import of_expected_widths, of_least_margin, respect_size

_STEPS, _PRECISION = 40, 1e-9
_MOST_PIECES = 200

Values = NDArray[np.float64]

SLACK = 1e-12
"""Overspending, relative to the budget's scale, that is rounding and not a violation."""


def evenly_narrowed(
    config: PolicyConfig, channel_map: ChannelMap, costs: CostModel, margin: Tensor | None = None
) -> Tensor:
    """The mask bool[C] of the network whose groups all keep the same share, as large as ``config`` allows:
    their atoms of the smallest ``margin`` (float64[C]), or the first ones. With masks of single filters what
    a stream holds, and so the cost of the same widths, depends on which they are."""
    budget = Budget.of(config, channel_map.groups, costs)
    margin = torch.zeros(channel_map.num_atoms).double() if margin is None else margin
    return budget.mask(budget.start(), margin)


@dataclass(frozen=True, eq=False)
class Budget:
    """What masks and probabilities may cost: rho times what the full network has of ``kind``; ``bounds`` are
    the smallest and largest keep probability. Raises ValueError: no probabilities within the bounds meet the
    budget."""

    kind: BudgetName
    rho: float
    groups: Sequence[Group]
    costs: CostModel
    bounds: tuple[float, float]

    def __post_init__(self) -> None:
        least = self.spent(self._all_at(self.bounds[0]))
        if least > self._most:
            raise ValueError(
                f"policy.rho {self.rho:g} of the {self.kind} is below the {least / self._whole:.3g} that "
                f"remain with every keep probability at its least, {self.bounds[0]:g}; raise policy.rho"
            )

    @classmethod
    def of(cls, config: PolicyConfig, groups: Sequence[Group], costs: CostModel) -> Budget:
        """What ``config`` allows. Raises ValueError: less than an atom of every group takes, in one of its
        networks; there is no group."""
        if not groups:
            raise ValueError("the channel map has no groups: nothing can be dropped; give it some")
        budget = cls(config.budget, config.rho, groups, costs, (config.floor, 1 - config.floor))
        for share in (config.rho, *config.budgets):
            budget.at(share).require_widths(1)
        return budget

    def require_widths(self, least: int) -> None:
        """Masks never have fewer than ``least`` atoms of a group. Raises ValueError: that is too many."""
        mask = torch.zeros(self.groups[-1].stop, dtype=torch.bool)
        for group in self.groups:
            mask[group.start : min(group.start + least, group.stop)] = True
        if (cost := self.of_mask(mask)) > self._most:
            raise ValueError(
                f"policy.rho {self.rho:g} of the {self.kind} is below the {cost / self._whole:.3g} that "
                f"remain with {least} of every group's atoms; raise policy.rho or lower atoms.block"
            )

    @cached_property
    def _whole(self) -> int:
        """What the full network has."""
        return self.of_mask(torch.ones(self.groups[-1].stop, dtype=torch.bool))

    @property
    def limit(self) -> float:
        """What a mask may cost."""
        return self.rho * self._whole

    @property
    def _most(self) -> float:
        """The limit, and what is rounding above it."""
        return self.limit * (1 + _PRECISION)

    def at(self, rho: float) -> Budget:
        """The budget of another share."""
        return replace(self, rho=rho)

    def to_move_in(self, margin: Tensor) -> Budget:
        """The same, but where it counts atoms the FLOPs of even widths: atoms of one layer are dearer than
        those of another, and widths that move would make for these. A group has an atom of them at least; and
        where filters share a stream, which holds less the more they keep the same channels of it, they are no
        more than those of the atoms of the smallest ``margin`` (float64[C])."""
        if self.kind != "count":
            return self
        sizes = torch.tensor([group.size for group in self.groups])
        even = self._all_at(self.rho).maximum((1 / sizes.double()).repeat_interleave(sizes))
        mask = of_least_margin(self.rounded_up(self.rho), margin, self.groups)
        flops = min(float(self.costs.expected_flops(even)), self.costs.flops(mask))
        return replace(self, kind="flops", rho=flops / self.costs.dense_flops)

    def rounded_up(self, share: float) -> Tensor:
        """The mask bool[C] of the first atoms of each group, this share of them or one more."""
        mask = torch.zeros(self.groups[-1].stop, dtype=torch.bool)
        for group in self.groups:
            mask[group.start : group.start + min(group.size, math.ceil(share * group.size - 1e-9))] = True
        return mask

    def spent(self, s: Tensor) -> float:
        """Expected cost of a draw from ``s`` (float64[C]), in the unit of the limit."""
        return float(self._expected(s))

    def slopes(self, s: Tensor) -> Tensor:
        """∂cost/∂log width of each group at the keep probabilities ``s`` (float64[C]): float64[G]."""
        _, slope = self._linearised(s)
        return torch.stack([(slope * s)[g.start : g.stop].sum() for g in self.groups])

    def of_mask(self, mask: Tensor) -> int:
        """Cost of a mask bool[C]."""
        if self.kind == "count":
            return int(mask.sum())
        return self.costs.parameters(mask) if self.kind == "params" else self.costs.flops(mask)

    def start(self) -> Tensor:
        """The one probability for all atoms, float64[C], that spends the budget."""
        if self.kind == "count":
            return self._all_at(min(self.rho, self.bounds[1]))
        return self._all_at(bisected(*self.bounds, lambda p: self.spent(self._all_at(p)) <= self.limit)[0])

    def project(self, z: Values) -> Values:
        """The probabilities near ``z`` (float64[C]) that meet bounds and budget; for ``count`` the nearest
        ones.

        Budgets of products are linearised anew until that settles, which gives the nearest ones, too, unless
        two layers can be traded for each other at almost no difference."""
        if self.kind == "count":
            return project(z, self.limit, *self.bounds)
        return self._project_products(torch.from_numpy(z)).numpy()

    def _project_products(self, z: Tensor) -> Tensor:
        low, high = self.bounds
        s = z.clamp(low, high)
        if self.spent(s) <= self._most:
            return s
        for _ in range(_STEPS):
            s = self._project_linearised(z, s)
            if abs(self.spent(s) - self.limit) <= _PRECISION * self.limit:
                return s
        return self._on_the_way(
            s, z.clamp(low, high) if self.spent(s) < self.limit else torch.full_like(s, low)
        )

    def _on_the_way(self, s: Tensor, end: Tensor) -> Tensor:
        """The point that spends the budget between ``s`` and ``end``; one of them spends more, one less."""
        rises = self.spent(end) > self.limit
        near, far = bisected(0.0, 1.0, lambda t: (self.spent(s + t * (end - s)) < self.limit) == rises)
        return s + (near if rises else far) * (end - s)

    def _project_linearised(self, z: Tensor, at: Tensor) -> Tensor:
        """The point nearest to ``z`` that meets the budget as linearised at ``at``."""
        low, high = self.bounds
        expected, cost = self._linearised(at)
        scale = float(cost.mean())
        room = max(self.limit - expected + float(cost @ at), low * float(cost.sum()))
        return torch.from_numpy(project(z.numpy(), room / scale, low, high, (cost / scale).numpy()))

    def mask(self, s: Tensor, margin: Tensor, least: int = 1) -> Tensor:
        """The mask bool[C] with the expected widths of ``s`` that spends the budget, as far as atoms allow;
        atoms of the largest ``margin`` go first (both float64[C]), and ``least`` of every group stay."""
        return of_expected_widths(s, margin, self.groups, least, lambda m: self.of_mask(m) <= self._most)

    def fitted(self, mask: Tensor, margin: Tensor) -> Tensor:
        """The mask without the fewest atoms, those of the largest ``margin``, that it has no room for."""
        return respect_size(mask, margin, self.groups, self.of_mask, int(self._most))

    def _all_at(self, probability: float) -> Tensor:
        return torch.full((self.groups[-1].stop,), probability, dtype=torch.float64)

    def _linearised(self, s: Tensor) -> tuple[float, Tensor]:
        """The expected cost at ``s``, and its derivative float64[C]."""
        leaf = s.clone().requires_grad_()
        with torch.enable_grad():
            expected = self._expected(leaf)
            (slope,) = torch.autograd.grad(expected, leaf)
        return expected.item(), slope

    def _expected(self, s: Tensor) -> Tensor:
        if self.kind == "count":
            return s.sum()
        return self.costs.expected_parameters(s) if self.kind == "params" else self.costs.expected_flops(s)


def bisected(low: float, high: float, fits: Callable[[float], bool]) -> tuple[float, float]:
    """The last number that fits and the first that does not, between ``low`` and ``high``."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def project(z: Values, budget: float, lower: float, upper: float, unit: Values | float = 1.0) -> Values:
    """The point nearest to ``z`` whose entries lie in [lower, upper] and that costs no more than the budget.
    Returns a new float64[C]. The budget is met to ``SLACK``; a second projection returns the same bits.
    Raises ValueError: z is not finite, or no point meets the budget.

    Args:
        z: float64[C].
        budget: largest value of sum(unit * s), in the unit of ``unit``.
        unit: float64[C], non-negative cost per atom; 1.0: every atom costs 1."""
    if not math.isfinite(z.sum()) and not np.isfinite(z).all():  # the sum of large ones may overflow
        raise ValueError("z must be finite numbers")
    whole = float(len(z)) if isinstance(unit, float) else float(unit.sum())
    slack = SLACK * whole * max(abs(lower), abs(upper), 1.0)
    cheapest = lower * whole
    if budget < cheapest - slack:
        raise ValueError(
            f"no probabilities meet the budget {budget:g}: the lower bound {lower:g} costs {cheapest:g}; "
            "raise the budget or lower the bound"
        )
    found = z.clip(lower, upper)
    if _cost(found, unit) <= budget + slack:
        return found
    if budget <= cheapest:
        return np.where(np.greater(unit, 0), lower, found)
    return _spend(z, budget, lower, upper, unit, slack)


def _spend(
    z: Values, budget: float, lower: float, upper: float, unit: Values | float, slack: float
) -> Values:
    """clip(z - v * unit) with the v > 0 that costs exactly ``budget``; the caller made sure there is one.

    The cost is a falling, piecewise linear function of v. Newton's method reaches its zero by way of few
    pieces; where a step would leave the bounds that are known of v, the next v is amid these. On the piece
    that holds the budget the rest follows from the atoms strictly between the bounds (the active set)."""
    low, v = 0.0, 0.0
    if isinstance(unit, float):
        high = float(z.max()) - lower
    else:
        high = float(np.divide(z - lower, unit, out=np.zeros_like(z), where=unit > 0).max())
    for number in range(_MOST_PIECES):
        start = z - v * unit
        s = start.clip(lower, upper)
        excess = _cost(s, unit) - budget
        active = (start > lower) & (start < upper)
        weight = float(np.count_nonzero(active) if isinstance(unit, float) else (unit[active] ** 2).sum())
        low, high = (v, high) if excess > 0 else (low, v)
        middle = 0.5 * (low + high)
        if abs(excess) <= slack or not low < middle < high:
            break
        step = v + excess / weight if weight > 0 and number < _MOST_PIECES // 2 else middle
        v = step if low < step < high else middle
    # Twice: the second pass removes the rounding of the first where z is large against the bounds.
    moving = active * unit
    for _ in range(2 if weight > 0 else 0):
        s = (s - (_cost(s, unit) - budget) / weight * moving).clip(lower, upper)
    return s


def _cost(s: Values, unit: Values | float) -> float:
    return float((s if isinstance(unit, float) else unit * s).sum())
