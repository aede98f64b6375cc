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
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.policy.config import BudgetName, PolicyConfig
from offload_sparse.policy.widths import of_expected_widths

_STEPS, _PRECISION = 40, 1e-9
_MOST_PIECES = 200

Values = NDArray[np.float64]

SLACK = 1e-12
"""Overspending, relative to the budget's scale, that is rounding and not a violation."""


class Costs(Protocol):
    """What masks cost, such as ``channels.accounting.CostModel``."""

    dense_flops: int
    dense_parameters: int

    def flops(self, mask: Tensor) -> int: ...

    def parameters(self, mask: Tensor) -> int: ...

    def outputs(self, mask: Tensor) -> float: ...

    def expected_flops(self, s: Tensor) -> Tensor: ...

    def expected_parameters(self, s: Tensor) -> Tensor: ...


def evenly_narrowed(config: PolicyConfig, channel_map: ChannelMap, costs: Costs) -> Tensor:
    """The mask bool[C] of the network whose groups all keep the same share, as large as ``config`` allows."""
    budget = Budget.to_start_with(config, channel_map.groups, costs)
    if config.budget == "count":
        return channel_map.uniform_mask(config.rho, config.min_width)
    start = budget.start()
    return budget.mask(start, 1 - start, config.min_width)


class Budget:
    """What masks and probabilities may cost: ``limit``, rho times what the full network has of ``kind``
    (``count`` needs no costs); ``bounds`` are the smallest and largest keep probability. Raises ValueError:
    no probabilities within the bounds meet the budget, or there are no costs to count."""

    def __init__(
        self,
        kind: BudgetName,
        rho: float,
        groups: Sequence[Group],
        costs: Costs | None,
        bounds: tuple[float, float],
    ) -> None:
        if kind != "count" and costs is None:
            raise ValueError(f"policy.budget {kind} needs the costs of the network; set it to count")
        self._kind, self._groups, self._costs, self._bounds = kind, groups, costs, bounds
        self._rho, self._count = rho, groups[-1].stop
        if kind == "count":
            whole = self._count
        else:
            assert costs is not None
            whole = costs.dense_parameters if kind == "params" else costs.dense_flops
        self.limit, self._whole = rho * whole, whole
        least = float(self._expected(torch.full((self._count,), bounds[0], dtype=torch.float64)))
        if least > self.limit * (1 + _PRECISION):
            raise ValueError(
                f"policy.rho {rho:g} of the {kind} is below the {least / whole:.3g} that remain with every "
                f"keep probability at its least, {bounds[0]:g}; raise policy.rho"
            )

    @classmethod
    def of(cls, config: PolicyConfig, groups: Sequence[Group], costs: Costs | None) -> Budget:
        """What ``config`` allows."""
        return cls(config.budget, config.rho, groups, costs, (config.floor, 1 - config.floor))

    @classmethod
    def to_start_with(cls, config: PolicyConfig, groups: Sequence[Group], costs: Costs | None) -> Budget:
        """What ``config`` allows, in which the minimum widths of all its networks fit. Raises ValueError:
        they do not."""
        budget = cls.of(config, groups, costs)
        for share in (config.rho, *config.budgets):
            budget.at(share).require_widths(config.min_width)
        return budget

    def require_widths(self, least: int) -> None:
        """Masks never have fewer than ``least`` atoms of a group. Raises ValueError: that is too many."""
        mask = torch.zeros(self._count, dtype=torch.bool)
        for group in self._groups:
            mask[group.start : min(group.start + least, group.stop)] = True
        if (cost := self.of_mask(mask)) > self.limit * (1 + _PRECISION):
            raise ValueError(
                f"policy.rho {self._rho:g} of the {self._kind} is below the {cost / self._whole:.3g} that "
                f"remain with {least} of every group's atoms; raise policy.rho or lower atoms.block"
            )

    def at(self, rho: float) -> Budget:
        """The budget of another share."""
        return Budget(self._kind, rho, self._groups, self._costs, self._bounds)

    def to_move_in(self) -> Budget:
        """The same, but where it counts atoms the FLOPs of the one probability that spends it: atoms of one
        layer are dearer than those of another, and widths that move would make for these."""
        if self._kind != "count":
            return self
        assert self._costs is not None
        share = float(self._costs.expected_flops(self.start())) / self._costs.dense_flops
        return Budget("flops", share, self._groups, self._costs, self._bounds)

    def spent(self, s: Tensor) -> float:
        """Expected cost of a draw from ``s`` (float64[C]), in the unit of the limit."""
        return float(self._expected(s))

    def slopes(self, s: Tensor) -> Tensor:
        """∂cost/∂log width of each group at the keep probabilities ``s`` (float64[C]): float64[G]."""
        leaf = s.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self._expected(leaf), leaf)
        return torch.stack([(slope * s)[g.start : g.stop].sum() for g in self._groups])

    def of_mask(self, mask: Tensor) -> int:
        """Cost of a mask bool[C]."""
        if self._costs is None or self._kind == "count":
            return int(mask.sum())
        return self._costs.parameters(mask) if self._kind == "params" else self._costs.flops(mask)

    def start(self) -> Tensor:
        """The one probability for all atoms, float64[C], that spends the budget."""
        low, high = self._bounds
        if self._kind == "count":
            return self.project(torch.full((self._count,), self._rho, dtype=torch.float64))
        for _ in range(60):
            middle = (low + high) / 2
            fits = self.spent(torch.full((self._count,), middle, dtype=torch.float64)) <= self.limit
            low, high = (middle, high) if fits else (low, middle)
        return torch.full((self._count,), low, dtype=torch.float64)

    def project(self, z: Tensor) -> Tensor:
        """The probabilities near ``z`` (float64[C]) that meet bounds and budget; for ``count`` the nearest
        ones.

        Budgets of products are linearised anew until that settles, which gives the nearest ones, too, unless
        two layers can be traded for each other at almost no difference."""
        return torch.from_numpy(self.nearest(z.numpy()))

    def nearest(self, z: Values) -> Values:
        """``project`` of an array."""
        if self._kind == "count":
            return nearest(z, self.limit, *self._bounds)
        return self._project_products(torch.from_numpy(z)).numpy()

    def _project_products(self, z: Tensor) -> Tensor:
        low, high = self._bounds
        s = z.clamp(low, high)
        if self.spent(s) <= self.limit * (1 + _PRECISION):
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
        near, far = 0.0, 1.0
        rises = self.spent(end) > self.limit
        for _ in range(60):
            middle = (near + far) / 2
            below = self.spent(s + middle * (end - s)) < self.limit
            near, far = (middle, far) if below == rises else (near, middle)
        return s + (near if rises else far) * (end - s)

    def _project_linearised(self, z: Tensor, at: Tensor) -> Tensor:
        """The point nearest to ``z`` that meets the budget as linearised at ``at``."""
        low, high = self._bounds
        leaf = at.clone().requires_grad_()
        expected = self._expected(leaf)
        (cost,) = torch.autograd.grad(expected, leaf)
        scale = float(cost.mean())
        room = self.limit - expected.item() + float(cost @ at)
        return project(z, max(room, low * float(cost.sum())) / scale, low, high, cost / scale)

    def mask(self, s: Tensor, margin: Tensor, min_width: int) -> Tensor:
        """The mask bool[C] with the expected widths of ``s`` that spends the budget, as far as atoms allow;
        atoms of the largest ``margin`` go first (both float64[C])."""
        most = self.limit * (1 + _PRECISION)
        return of_expected_widths(s, margin, self._groups, min_width, lambda m: self.of_mask(m) <= most)

    def _expected(self, s: Tensor) -> Tensor:
        if self._kind == "count":
            return s.sum()
        assert self._costs is not None
        return self._costs.expected_parameters(s) if self._kind == "params" else self._costs.expected_flops(s)


def project(
    z: Tensor, budget: float, lower: float = 0.0, upper: float = 1.0, cost: Tensor | None = None
) -> Tensor:
    """The point nearest to ``z`` whose entries lie in [lower, upper] and that costs no more than the budget.
    Returns a new float64[C]. The budget is met to ``SLACK``; a second projection returns the same bits.
    Raises ValueError: a shape, dtype or value is wrong, or no point meets the budget.

    Args:
        z: float64[C], any finite values.
        budget: largest value of sum(cost * s), in the unit of ``cost`` (atoms when that is None).
        cost: float64[C], non-negative cost per atom; None: every atom costs 1."""
    _check(z, budget, lower, upper, cost)
    return torch.from_numpy(nearest(z.numpy(), budget, lower, upper, 1.0 if cost is None else cost.numpy()))


def nearest(z: Values, budget: float, lower: float, upper: float, unit: Values | float = 1.0) -> Values:
    """``project`` of what has been checked but for its values; ``unit`` is the cost of every atom."""
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
    if (spent := _cost(found, unit)) <= budget + slack:
        return found
    if budget <= cheapest:
        return np.where(np.greater(unit, 0), lower, found)
    return _spend(z, found, spent - budget, budget, lower, upper, unit, slack)


def _check(z: Tensor, budget: float, lower: float, upper: float, cost: Tensor | None) -> None:
    if z.dtype != torch.float64 or z.dim() != 1:
        raise ValueError(f"z is {z.dtype}{list(z.shape)}; give one float64 vector")
    if cost is not None and (cost.dtype != torch.float64 or cost.shape != z.shape):
        raise ValueError(f"cost is {cost.dtype}{list(cost.shape)}; give float64{list(z.shape)}")
    if budget != budget or not (cost is None or bool(cost.isfinite().all())):
        raise ValueError("cost and budget must be finite numbers")
    if cost is not None and bool((cost < 0).any()):
        raise ValueError("cost has negative entries; give 0 or more per atom")
    if lower > upper:
        raise ValueError(f"the lower bound {lower:g} is above the upper bound {upper:g}")


def _spend(
    z: Values,
    s: Values,
    excess: float,
    budget: float,
    lower: float,
    upper: float,
    unit: Values | float,
    slack: float,
) -> Values:
    """clip(z - v * unit) with the v > 0 that costs exactly ``budget``; the caller made sure there is one, and
    knows clip(z) and how far above the budget it is.

    The cost is a falling, piecewise linear function of v. Newton's method reaches its zero by way of few
    pieces; where a step would leave the bounds that are known of v, the next v is amid these. On the piece
    that holds the budget the rest follows from the atoms strictly between the bounds (the active set)."""
    low, v, start = 0.0, 0.0, z
    if isinstance(unit, float):
        high = float(z.max()) - lower
    else:
        high = float(np.divide(z - lower, unit, out=np.zeros_like(z), where=unit > 0).max())
    for number in range(_MOST_PIECES):
        if number:
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
