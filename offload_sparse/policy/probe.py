"""Widths that pay: pairs of forward passes tell what a channel of every layer is worth, and widths follow.

    rates δ_g that remove equal cost ──▶ pairs m, m' ──▶ L(m) - L(m') ──▶ worth per cost ──▶ new widths
    of the present channels              forward only    regression on    over cycles,       bounded moves,
                                                         dropped shares   shrunk             same budget

Each pair is VR-PGE's (Zhou et al. 2021, equation 5) with s_g = 1 - δ_g around the present widths: two forward
passes, no backward pass. A dropped channel is absent, survivors are scaled by 1/(1 - δ_g), or less in groups
of few. It takes a network whose learning rate has come down: at a high one the loss says what trains soonest,
not what ends best.

Everything is float64 on the CPU, and a function of its arguments: ranks that sum the same comparisons move
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.budget import bisected
from offload_sparse.policy.samplers import mask_generator, uniforms

MEAN_RATE, MOST = 0.08, 0.4
"""Share of the channels that a probe drops: mean over groups, and the largest of a group."""

_RIDGE, _LEAST_VARIANCE = 1e-6, 1e-9
"""What lets a regression be solved: relative to the variances of the shares, and to the largest of these.
More would take groups that vary least, the wide and dear ones, for worthless."""

_FORGET = 0.5
"""What an earlier cycle's evidence counts for in the next one: the widths have moved since."""

_TOGETHER = 0.8
"""Correlation, before any data, of what the layers of a stage are worth."""

STEP, LARGEST, BUDGET_SHARE = 0.3, 0.4, 0.04
"""A move of log-widths: per standard deviation of worth; at most; at most this share of the budget."""


def present_widths(mask: Tensor, groups: Sequence[Group]) -> Tensor:
    """float64[G]: kept atoms of each group of ``mask`` (bool[C])."""
    return torch.tensor([int(mask[g.start : g.stop].sum()) for g in groups], dtype=torch.float64)


def probe_rates(cost_slopes: Tensor) -> Tensor:
    """δ float64[G]: the share of its channels that each group drops, so that all remove the same cost;
    ``cost_slopes`` is ∂cost/∂log width, float64[G]."""
    shares = 1 / cost_slopes.clamp_min(1e-9 * float(cost_slopes.max()))
    most = MOST / float(shares.min())
    # the one factor with which the mean of the capped rates is right
    factor, _ = bisected(0.0, most, lambda f: float((f * shares).clamp_max(MOST).mean()) < MEAN_RATE)
    return (factor * shares).clamp_max(MOST)


def probe_pair(
    mask: Tensor, groups: Sequence[Group], rates: Tensor, seed: int, pair: int, probe: int = 0
) -> tuple[Tensor, Tensor]:
    """m and m', bool[C]: independent draws that drop each channel of ``mask`` with its group's rate.

    A group keeps its most fortunate channel, at least. A function of its arguments: rank r takes the pairs r,
    r + R, r + 2R, … and nobody has to say which."""
    per_atom = torch.repeat_interleave(rates, torch.tensor([g.size for g in groups]))
    draws = []
    for stream in range(2):
        u = torch.where(mask, uniforms(len(mask), mask_generator(seed, pair, 2 * probe + stream)), -1.0)
        kept = u >= per_atom
        for group in groups:
            inside = slice(group.start, group.stop)
            if not bool(kept[inside].any()) and bool(mask[inside].any()):
                kept[group.start + int(u[inside].argmax())] = True
        draws.append(kept)
    return draws[0], draws[1]


def survivor_scales(mask: Tensor, groups: Sequence[Group], rates: Tensor) -> Tensor:
    """float64[C]: what surviving channels of ``mask`` are multiplied by: 1 over the share that is left of a
    group in the mean, 1 − δ_g and, since one channel of n stays whatever is drawn, δ_g^n / n."""
    width = present_widths(mask, groups)
    left = 1 - rates + rates**width / width
    return torch.repeat_interleave(1 / left, torch.tensor([g.size for g in groups]))


class Comparisons:
    """Loss differences of probes, as the normal equations of their regression; those of ranks add up.

    Attributes:
        sums: float64[G + 1, G + 1], Σ of the outer products of (x_1 … x_G, y): x_g is the share of group g's
            channels that m drops less that of m', y is L(m) − L(m').
        count: pairs."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self.sums = torch.zeros(len(groups) + 1, len(groups) + 1, dtype=torch.float64)
        self.count = 0

    def add(self, difference: float, mask: Tensor, m: Tensor, m_ref: Tensor) -> None:
        """One pair around ``mask`` (bool[C]); a difference that is not finite is left out."""
        row = torch.empty(len(self._groups) + 1, dtype=torch.float64)
        width = present_widths(mask, self._groups).clamp_min(1)
        row[:-1] = (present_widths(m_ref, self._groups) - present_widths(m, self._groups)) / width
        row[-1] = difference
        if bool(row.isfinite().all()):
            self.sums += torch.outer(row, row)
            self.count += 1

    def regressed(self) -> tuple[Tensor, Tensor]:
        """Loss per dropped share and its standard error, float64[G] each, by least squares; of a group from
        which no pair has dropped anything the error is beyond all others. Needs two pairs more than there
        are groups."""
        size = len(self._groups)
        assert self.count > size + 1, "so few pairs say nothing"
        gram, right, square = self.sums[:size, :size], self.sums[:size, size], float(self.sums[size, size])
        variances = gram.diagonal()
        scale = variances.clamp_min(_LEAST_VARIANCE * float(variances.max()) + 1e-300).rsqrt()
        correlated = scale[:, None] * gram * scale + _RIDGE * torch.eye(size, dtype=torch.float64)
        inverse = scale[:, None] * torch.linalg.inv(correlated) * scale
        values = inverse @ right
        residual = square - 2 * float(values @ right) + float(values @ gram @ values)
        variance = max(residual, 0.0) / (self.count - size)
        return values, (variance * inverse.diagonal()).clamp_min(1e-24).sqrt()


def stages(groups: Sequence[Group], dense_slopes: Tensor) -> Tensor:
    """int64[G]: the stage of each group, in the order of the network. Neighbours of equal size that cost
    about as much (∂cost/∂log width at full width, float64[G]) are of one stage."""
    numbers = [0]
    for i in range(1, len(groups)):
        ratio = float(dense_slopes[i] / dense_slopes[i - 1].clamp_min(1e-12))
        same = groups[i].size == groups[i - 1].size and 0.5 < ratio < 2
        numbers.append(numbers[-1] + (not same))
    return torch.tensor(numbers)


class Worth:
    """What a channel of each group is worth per unit of cost, over the cycles seen so far: precision (1 /
    variance of the mean over cycles; earlier cycles count for less), and precision times mean, float64[G]
    each."""

    def __init__(self, stage_of: Tensor) -> None:
        self._same = (stage_of[:, None] == stage_of[None]).to(torch.float64)
        self.precision = torch.zeros(len(stage_of), dtype=torch.float64)
        self.weighted = torch.zeros_like(self.precision)

    def observe(self, values: Tensor, errors: Tensor, cost_slopes: Tensor, cost: float) -> None:
        """A probe: loss per dropped share and its error (float64[G]), ∂cost/∂log width, and the cost itself.

        Dropping a share of a group saves ``cost_slopes / cost`` of the cost, so the quotient is the loss per
        share of the cost."""
        per_cost = cost / cost_slopes
        precision = 1 / (errors * per_cost) ** 2
        self.precision = _FORGET * self.precision + precision
        self.weighted = _FORGET * self.weighted + precision * values * per_cost

    def advantage(self) -> tuple[Tensor, float]:
        """How much more than the mean a group is worth, float64[G], shrunk; and its spread over groups.

        The prior is normal around a common mean, with a variance that the data choose (empirical Bayes) and a
        correlation within stages: where errors are large, layers of a stage share what they know, and what
        nobody knows is zero."""
        mean, noise = self.weighted / self.precision, 1 / self.precision
        identity = torch.eye(len(mean), dtype=torch.float64)
        shape = _TOGETHER * self._same + (1 - _TOGETHER) * identity
        candidates = [float(mean.var()) * 2.0**-power for power in range(12)] + [0.0]
        tau = max(candidates, key=lambda t: _evidence(mean, t * shape + noise.diag()))
        inverse = torch.linalg.inv(tau * shape + noise.diag())
        centre = float((inverse @ mean).sum() / inverse.sum())
        return tau * shape @ inverse @ (mean - centre), tau**0.5


def _evidence(mean: Tensor, covariance: Tensor) -> float:
    """Log likelihood of ``mean`` around a common centre, which is integrated out."""
    inverse = torch.linalg.inv(covariance)
    deviation = mean - float((inverse @ mean).sum() / inverse.sum())
    width = float(torch.logdet(covariance)) + float(torch.log(inverse.sum()))
    return -0.5 * (width + float(deviation @ inverse @ deviation))


def move(advantage: Tensor, spread: float, cost_slopes: Tensor, cost: float) -> Tensor:
    """Change of log-widths, float64[G], by the ``advantage`` of ``Worth`` and its spread (0 moves nothing):
    those worth more grow, at the expense of those worth less, at the same cost (``cost_slopes`` is ∂cost/∂log
    width)."""
    if spread <= 0:
        return torch.zeros_like(advantage)
    bound = (BUDGET_SHARE * cost / cost_slopes).clamp_max(LARGEST)
    return torch.minimum(torch.maximum(STEP * advantage / spread, -bound), bound)
