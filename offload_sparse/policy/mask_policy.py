"""MaskPolicy: the keep probabilities s of all atoms, the masks drawn from them, and how s is learned.

    sample(round) ──▶ m1, m2 ──▶ losses measured elsewhere ──▶ update(L(m1), L(m2), m1, m2, round)
                                                                 estimate · precondition · optimizer step ·
                                                                 project

Everything is float64 on the CPU and a function of (configuration, seed, the losses seen so far): ranks that
pass the same losses hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.budget import Budget, project
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.diagnostics import Diagnostics
from offload_sparse.policy.estimators import (
    CONTROLLED,
    ESTIMATORS,
    Comparison,
    ControlVariate,
    apart_factor,
    leave_one_out,
    precondition,
    preconditioned_rloo,
)
from offload_sparse.policy.parametrisation import Parametrisation
from offload_sparse.policy.samplers import (
    CANDIDATES,
    FIRST,
    RANKS,
    SECOND,
    Bernoulli,
    Drawn,
    FixedWidth,
    Persistent,
    Sampler,
)
from offload_sparse.policy.widths import of_least_margin, respect_size, respect_widths

_OPEN = 0.3
"""Share of a one-shot cut that a search may still change, at its start."""


class MaskPolicy:
    """p(m | s) over the masks of a network, with an expected cost within the budget at all times.

    s starts at the same value everywhere and stays in [floor, 1 - floor]. Groups that would be empty and hard
    caps change a few drawn atoms after the fact; the estimators treat these masks as if they had been drawn
    from p(m|s), a bias that is small when groups are wide and caps are rarely reached. Raises ValueError: the
    budget cannot be met.

    Args:
        config: rho, estimator, sampler, optimizer and bounds.
        groups: the groups of the atoms, covering 0 … C - 1 in order.
        seed: seed of the masks; equal on all ranks.
        costs: what masks cost.
        importance: float64[C], by which the atoms of a group are ranked at the start; None tells none apart.

    Attributes:
        trivial: rho is 1: s = 1, every mask keeps everything, nothing is learned. Only then it ``stays``: the
            masks of all rounds are the same.
        cap: most atoms that a drawn mask keeps: ceil(hard_cap * rho * C) for a budget of atoms (at most C),
            else C.
        size_cap: most parameters that the subnet of any mask of the run has: hard_cap^2 times those of a
            network that is narrowed evenly to the budget, since a network narrowed by a factor shrinks by its
            square. More only where an atom of every group demands it."""

    def __init__(
        self,
        config: PolicyConfig,
        groups: Sequence[Group],
        seed: int,
        costs: CostModel,
        importance: Tensor | None = None,
    ) -> None:
        self.config = config.resolved(compiled=False)
        self.groups = tuple(groups)
        self.seed = seed
        self.trivial = self.stays = config.rho == 1
        self._costs = costs
        self._budget = Budget.of(config, self.groups, costs)
        self.num_atoms = self.groups[-1].stop
        start = torch.ones(self.num_atoms, dtype=torch.float64) if self.trivial else self._budget.start()
        self._uniform = self._budget.mask(start, 1 - start)
        self._widths = [int(self._uniform[g.start : g.stop].sum()) for g in self.groups]
        self.cap, self.size_cap, self._flops_cap = self._caps(start)
        self._sampler = self._build_sampler()
        if importance is not None and not self.trivial:
            start = torch.from_numpy(self._nearest(tilted(start, importance, self.groups).numpy()))
        self._learned = Parametrisation(self.config, self.groups, start)
        self._control = ControlVariate(self.groups)
        self._diagnostics = Diagnostics(self.groups, config.floor, start)

    @property
    def s(self) -> Tensor:
        """The keep probabilities float64[C]; a read-only view by convention."""
        return self._learned.s

    @property
    def entropy(self) -> float:
        """Mean entropy of the Bernoulli variables, in bits per atom: 1 is undecided, 0 is decided."""
        s = self.s
        return float((torch.special.entr(s) + torch.special.entr(1 - s)).mean()) / math.log(2)

    # --- masks ---

    def sample(self, round: int) -> tuple[Tensor, Tensor]:
        """m1 and its reference m2, bool[C], paired as the estimator needs them; a function of (s, seed,
        round)."""
        return self._draw(round, FIRST), self._draw(round, SECOND)

    def sample_for_ranks(self, round: int, ranks: int) -> tuple[Tensor, ...]:
        """m1 and a reference mask for each of ``ranks`` ranks, all independent; the first is that of
        ``sample``."""
        references = [self._draw(round, RANKS + rank) for rank in range(1, ranks)]
        return *self.sample(round), *references

    def sample_subnets(self, round: int, ranks: int, disjoint: bool = False) -> tuple[Tensor, ...]:
        """A mask for each of ``ranks`` ranks, independent, or with ``disjoint`` as far apart as s allows; the
        first is that of ``sample``."""
        if disjoint:
            assert isinstance(self._sampler, Bernoulli), "checked with the settings"
            return tuple(map(self._usable, self._sampler.draw_apart(self.s, round, ranks)))
        others = [self._draw(round, RANKS + rank) for rank in range(1, ranks)]
        return self._draw(round, FIRST), *others

    def candidates(self, count: int, round: int = 0) -> list[Tensor]:
        """Masks bool[C] to choose the final network from before ``round``: the most probable atoms, then
        ``count`` drawn from p(m | s). All have the expected widths of their groups and are as close to the
        budget as their atoms allow. Equal masks are listed once, so that no subnet is measured twice."""
        first = round if self.config.sampler == "persistent" else 0
        drawn = [self._sampler.draw(self.s, index, CANDIDATES) for index in range(first, first + count)]
        masks = [self._final(margin) for margin in (1 - self.s, *(draw.margin for draw in drawn))]
        return list({mask.numpy().tobytes(): mask for mask in masks}.values())

    # --- learning ---

    def update(
        self,
        losses: Sequence[float],
        reference_losses: Sequence[float],
        m1: Tensor,
        m2: Tensor,
        round: int = 0,
    ) -> None:
        """Steps on s from L(m1) and L(m2), one after the other; a trivial policy stays as it is. Raises
        ValueError: a loss is not a finite number.

        Args:
            losses: L(m1), of every comparison of a round.
            reference_losses: L(m2), likewise.
            m1: bool[C], the mask of ``round``.
            m2: bool[C], its reference.
            round: which atoms were drawn for the reference anew depends on it."""
        if self.trivial:
            return
        differences = [a - b for a, b in zip(losses, reference_losses, strict=True)]
        name = self.config.estimator
        redrawn, kept, other = self._sampler.redrawn(round), m1.double(), m2.double()
        self._diagnostics.compared(differences, m1, round)
        if name == "rloo":  # 0 for all atoms but those that differ
            where = np.flatnonzero(redrawn & (m1 != m2))
            step = (kept - other).numpy()[where]
            for difference in differences:
                self._settle(preconditioned_rloo(difference, step, self._learned.values[where]), where)
            return
        for first, second in zip(losses, reference_losses, strict=True):
            mean = self._sampler.mean(self.s) if name in ("pge", "vr_pge") else None
            control = self._control.of_round(round) if name == CONTROLLED else None
            g = ESTIMATORS[name](Comparison(first, second, kept, other, self.s, mean, control))
            if control is not None:
                self._control.compared(first - second, kept - other)
            self._move(g, redrawn)

    def update_from_ranks(
        self, losses: Tensor, masks: Tensor, round: int = 0, disjoint: bool = False
    ) -> None:
        """Steps on s by leave-one-out over R masks, one after the other.

        Args:
            losses: float64[steps, R].
            masks: bool[R, C].
            round: as in ``update``.
            disjoint: they have been drawn apart (see ``sample_subnets``)."""
        if self.trivial:
            return
        differences = (losses[:, 0] - losses[:, 1:].mean(1)).tolist()
        self._diagnostics.compared(differences, masks[0], round)
        redrawn = self._sampler.redrawn(round)
        for row in losses:
            g = leave_one_out(row, masks, self.s)
            self._move(g / apart_factor(self.s, len(masks)) if disjoint else g, redrawn)

    def report(self) -> dict[str, Any]:
        """Entropy of s, and what ``policy.diagnostics`` has counted since the last report."""
        return {"entropy": self.entropy} | self._diagnostics.report(self.s)

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that is learned and counted; configuration and seed are the caller's."""
        tensors = {"s": self.s}
        tensors |= {f"optimizer/{name}": value for name, value in self._learned.slots().items()}
        tensors |= {f"control/{name}": value for name, value in self._control.state().items()}
        tensors |= {f"diagnostics/{name}": value for name, value in self._diagnostics.state().items()}
        return {name: value.clone() for name, value in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from ``state_dict()`` bit for bit. Raises ValueError: the state belongs to another number of
        atoms or to another optimizer."""
        s = tensors["s"]
        if s.dtype != torch.float64 or s.shape != (self.num_atoms,):
            raise ValueError(
                f"the saved probabilities are {s.dtype}{list(s.shape)}, the model has {self.num_atoms} "
                "atoms; load a checkpoint of the same model"
            )
        self._learned.load(s, _under(tensors, "optimizer/"))
        self._control.load(_under(tensors, "control/"))
        self._diagnostics.load(_under(tensors, "diagnostics/"))

    # --- parts ---

    def _draw(self, round: int, stream: int) -> Tensor:
        return self._usable(self._sampler.draw(self.s, round, stream))

    def _usable(self, drawn: Drawn) -> Tensor:
        """A draw without empty groups and within the caps; one of fixed widths is so by itself."""
        if self.config.sampler == "fixed_width":
            return drawn.mask
        mask = respect_widths(drawn.mask, self.s, self.groups, self.cap, drawn.margin)
        return self._fitting(mask, drawn.margin)

    def _fitting(self, mask: Tensor, margin: Tensor) -> Tensor:
        if self.trivial:
            return mask
        for size, cap in ((self._costs.parameters, self.size_cap), (self._costs.flops, self._flops_cap)):
            if cap:
                mask = respect_size(mask, margin, self.groups, size, cap)
        return mask

    def _final(self, margin: Tensor) -> Tensor:
        """The mask of the smallest margins that has the widths to end with."""
        if self.config.sampler == "fixed_width":
            return self._budget.fitted(of_least_margin(self._uniform, margin, self.groups), margin)
        return self._fitting(self._budget.mask(self.s, margin), margin)

    def _move(self, gradient: Tensor, redrawn: Tensor) -> None:
        """One step by the gradient of those atoms that were drawn for the reference anew."""
        where = np.flatnonzero(redrawn)
        self._settle(precondition(gradient, self.s).numpy()[where], where)

    def _settle(self, moved: NDArray[np.float64], where: NDArray[np.int64]) -> None:
        """One step by a preconditioned gradient, that of the atoms ``where``, and 0 for the others."""
        self._learned.settle(self._nearest(self._learned.move(moved, where)))

    def _nearest(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probabilities nearest to ``z`` within bounds and budget; a group of fixed width has its own."""
        if self.config.sampler != "fixed_width":
            return self._budget.project(z)
        floor, parts = self.config.floor, []
        for group, width in zip(self.groups, self._widths, strict=True):
            least = min(floor, width / group.size)
            parts.append(project(z[group.start : group.stop], width, least, 1 - floor))
        return np.concatenate(parts)

    def _caps(self, start: Tensor) -> tuple[int, int, int]:
        """Most atoms, parameters and FLOPs (0 if another budget) of a mask. Those of a network whose groups
        all keep so many of their atoms, rounded up, are given ``hard_cap``; where filters share a stream, of
        which masks of their own leave more, those of masks in the mean."""
        config, costs, atoms = self.config, self._costs, self.num_atoms
        if config.budget == "count":
            atoms = math.ceil(min(atoms, config.hard_cap * self._budget.limit - 1e-9))
        even, room = self._budget.rounded_up(float(start.mean())), config.hard_cap**2
        parameters = max(costs.parameters(even), round(float(costs.expected_parameters(start))))
        flops = max(costs.flops(even), round(float(costs.expected_flops(start))))
        parameters = math.ceil(min(costs.dense_parameters, room * parameters))
        flops = math.ceil(min(costs.dense_flops, room * flops))
        return atoms, parameters, flops if config.budget == "flops" else 0

    def _build_sampler(self) -> Sampler:
        config = self.config
        if config.sampler == "fixed_width":
            return FixedWidth(self.groups, self._widths, self.seed)
        if config.sampler == "persistent":
            return Persistent(self.num_atoms, self.seed, config.refresh)
        return Bernoulli(self.num_atoms, self.seed, config.estimator == CONTROLLED)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def tilted(s: Tensor, importance: Tensor, groups: Sequence[Group]) -> Tensor:
    """Keep probabilities float64[C] whose mean over a group is that of ``s``, and whose order within it is
    that of ``importance``: the most probable mask is the one-shot cut, and ``_OPEN`` of it is left open."""
    tilted = s.clone()
    for group in groups:
        inside = slice(group.start, group.stop)
        mean = float(s[inside].mean())
        rank = torch.empty(group.size, dtype=torch.float64)
        order = importance[inside].argsort(descending=True, stable=True)
        rank[order] = torch.arange(group.size, dtype=torch.float64)
        cut = (mean * group.size - rank).clamp(0, 1)  # of the last atom a part
        slope = 0.9 * min(mean, 1 - mean) * (1 - 2 * (rank + 0.5) / group.size)
        tilted[inside] = (1 - _OPEN) * cut + _OPEN * (mean + slope)
    return tilted
