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

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.budget import Budget, Costs, nearest
from offload_sparse.policy.config import ALPHA, PolicyConfig
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
from offload_sparse.policy.widths import minimum_size, of_least_margin, respect_size, respect_widths

_OPEN = 0.3
"""Share of a one-shot cut that a search may still change, at its start."""


class MaskPolicy:
    """p(m | s) over the masks of a network, with an expected cost within the budget at all times.

    s starts at the same value everywhere and stays in [floor, 1 - floor]. With rho = 1 the policy is
    ``trivial``: s = 1, every mask keeps everything, nothing is learned. Minimum widths and hard caps change a
    few drawn atoms after the fact; the estimators treat these masks as if they had been drawn from p(m|s), a
    bias that is small when groups are much wider than ``min_width`` and caps are rarely reached. Raises
    ValueError: there are no groups, or the budget cannot be met.

    Args:
        config: rho, estimator, sampler, optimizer and bounds; its sampler ``auto`` is ``bernoulli`` here.
        groups: the groups of the atoms, covering 0 … C - 1 in order.
        seed: seed of the masks; equal on all ranks.
        costs: what masks cost, if their parameters or FLOPs are to be bounded, too.

    Attributes:
        cap: most atoms that a drawn mask keeps: ceil(hard_cap * rho * C) for a budget of atoms (at least the
            minimum widths, at most C), else C.
        size_cap: most parameters that the subnet of any mask of the run has: hard_cap^2 times those of a
            network that is narrowed evenly to the budget, since a network narrowed by a factor
            shrinks by its square. More only where minimum widths demand it. 0 without ``costs``."""

    def __init__(
        self,
        config: PolicyConfig,
        groups: Sequence[Group],
        seed: int,
        costs: Costs | None = None,
        importance: Tensor | None = None,
    ) -> None:
        if not groups:
            raise ValueError("there is nothing to sample: the model has no groups of channels")
        self.config = config.resolved(compiled=False)
        self.groups = tuple(groups)
        self.seed = seed
        self.num_atoms = self.groups[-1].stop
        self._costs = costs
        self._frozen = False
        self._bounds = (config.floor, 1 - config.floor)
        self._budget = Budget.of(config, self.groups, costs)
        start = torch.ones(self.num_atoms, dtype=torch.float64) if self.trivial else self._budget.start()
        self._uniform = self._budget.mask(start, 1 - start, config.min_width)
        self.cap, self.size_cap, self._flops_cap = self._caps()
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
    def trivial(self) -> bool:
        """Whether rho is 1, so that every mask keeps everything."""
        return self.config.rho == 1

    @property
    def stays(self) -> bool:
        """Whether the masks of all rounds are the same."""
        return self.trivial

    @property
    def frozen(self) -> bool:
        """Whether s is learned no more."""
        return self._frozen

    @property
    def expected_size(self) -> float:
        """Expected number of atoms of a raw draw, sum(s)."""
        return float(self.s.sum())

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
        return list({mask.numpy().tobytes(): mask for mask in reversed(masks)}.values())[::-1]

    # --- learning ---

    def update(
        self,
        loss: float | Sequence[float],
        reference_loss: float | Sequence[float],
        m1: Tensor,
        m2: Tensor,
        round: int = 0,
    ) -> None:
        """One step on s from L(m1) and L(m2), or one after the other from those of all steps of a round; a
        trivial or frozen policy stays as it is. Raises FloatingPointError: a loss is not a finite number;
        ValueError: a mask is not bool[C].

        Args:
            loss: L(m1), of every comparison.
            reference_loss: L(m2), likewise.
            m1: bool[C], the mask of ``round``.
            m2: bool[C], its reference.
            round: which atoms were drawn for the reference anew depends on it."""
        losses = [loss] if isinstance(loss, int | float) else loss
        references = [reference_loss] if isinstance(reference_loss, int | float) else reference_loss
        pairs = list(zip(losses, references, strict=True))
        differences = [a - b for a, b in pairs]
        for difference in differences:
            if not math.isfinite(difference):
                found = f"the loss difference L(m1) - L(m2) is {difference}"
                raise FloatingPointError(f"{found}: the training diverged; lower optim.lr")
        for mask in (m1, m2):
            if mask.dtype != torch.bool or mask.shape != (self.num_atoms,):
                raise ValueError(f"a mask is {mask.dtype}{list(mask.shape)}; give bool[{self.num_atoms}]")
        if self.trivial or self.frozen:
            return
        name = self.config.estimator
        redrawn, kept, other = self._sampler.redrawn(round), m1.double(), m2.double()
        self._diagnostics.compared(differences, m1, round)
        if name == "rloo":  # 0 for all atoms but those that differ
            where = np.flatnonzero(redrawn & (m1 != m2))
            step = (kept - other).numpy()[where]
            learned = self._learned
            for difference in differences:
                self._settle(preconditioned_rloo(difference, step, learned.values[where], ALPHA), where)
            return
        for (first, second), difference in zip(pairs, differences, strict=True):
            mean = self._sampler.mean(self.s) if name in ("pge", "vr_pge") else None
            control = self._control.of_round(round) if name == CONTROLLED else None
            g = ESTIMATORS[name](Comparison(first, second, kept, other, self.s, mean, control))
            if control is not None:
                self._control.compared(difference, kept - other)
            self._move(g, redrawn)

    def update_from_ranks(
        self, losses: Tensor, masks: Tensor, round: int = 0, disjoint: bool = False
    ) -> None:
        """Steps on s by leave-one-out over R masks, one after the other.

        Args:
            losses: float64[R], or float64[steps, R].
            masks: bool[R, C].
            round: as in ``update``.
            disjoint: they have been drawn apart (see ``sample_subnets``)."""
        if not (self.trivial or self.frozen):
            assert losses.shape[-1] == len(masks), "a loss of every mask"
            rows = losses.view(-1, len(masks))
            differences = (rows[:, 0] - rows[:, 1:].mean(1)).tolist()
            self._diagnostics.compared(differences, masks[0], round)
            redrawn = self._sampler.redrawn(round)
            for row in rows:
                g = leave_one_out(row, masks, self.s)
                self._move(g / apart_factor(self.s, len(masks)) if disjoint else g, redrawn)

    def freeze(self) -> None:
        """Stop learning s; masks can still be drawn."""
        self._frozen = True

    def report(self) -> dict[str, Any]:
        """Entropy of s, and what ``policy.diagnostics`` has counted since the last report."""
        return {"entropy": self.entropy} | self._diagnostics.report(self.s)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is learned and counted; configuration and seed are the caller's."""
        tensors = {"s": self.s}
        tensors |= {f"optimizer/{name}": value for name, value in self._learned.slots().items()}
        tensors |= {f"control/{name}": value for name, value in self._control.state().items()}
        tensors |= {f"diagnostics/{name}": value for name, value in self._diagnostics.state().items()}
        return {"tensors": {n: t.clone() for n, t in tensors.items()}, "frozen": self._frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict()`` bit for bit. Raises ValueError: the state belongs to another number of
        atoms or to another optimizer."""
        tensors: Mapping[str, Tensor] = state["tensors"]
        s = tensors["s"]
        if s.dtype != torch.float64 or s.shape != (self.num_atoms,):
            raise ValueError(
                f"the saved probabilities are {s.dtype}{list(s.shape)}, the model has {self.num_atoms} "
                "atoms; load a checkpoint of the same model"
            )
        self._learned.load(s, _under(tensors, "optimizer/"))
        self._control.load(_under(tensors, "control/"))
        self._diagnostics.load(_under(tensors, "diagnostics/"))
        self._frozen = bool(state["frozen"])

    # --- parts ---

    def _draw(self, round: int, stream: int) -> Tensor:
        return self._usable(self._sampler.draw(self.s, round, stream))

    def _usable(self, drawn: Drawn) -> Tensor:
        """A draw with its minimum widths and within the caps; one of fixed widths is so by itself."""
        if self.config.sampler == "fixed_width":
            return drawn.mask
        mask, min_width = drawn.mask, self.config.min_width
        mask = respect_widths(mask, self.s, self.groups, min_width, self.cap, drawn.margin)
        return self._fitting(Drawn(mask, drawn.margin))

    def _fitting(self, drawn: Drawn) -> Tensor:
        mask, costs = drawn.mask, self._costs
        if costs is None or self.trivial:
            return mask
        for size, cap in ((costs.parameters, self.size_cap), (costs.flops, self._flops_cap)):
            if cap:
                mask = respect_size(mask, drawn.margin, self.groups, self.config.min_width, size, cap)
        return mask

    def _final(self, margin: Tensor) -> Tensor:
        """The mask of the smallest margins that has the widths to end with."""
        if self.config.sampler != "fixed_width":
            mask = self._budget.mask(self.s, margin, self.config.min_width)
            return self._fitting(Drawn(mask, margin))
        return of_least_margin(self._uniform, margin, self.groups)

    def _uniform_widths(self) -> list[int]:
        return [int(self._uniform[g.start : g.stop].sum()) for g in self.groups]

    def _move(self, gradient: Tensor, redrawn: Tensor) -> None:
        """One step by the gradient of those atoms that were drawn for the reference anew."""
        where = np.flatnonzero(redrawn)
        self._settle(precondition(gradient, self.s, ALPHA).numpy()[where], where)

    def _settle(self, moved: NDArray[np.float64], where: NDArray[np.int64]) -> None:
        """One step by a preconditioned gradient, that of the atoms ``where``, and 0 for the others."""
        self._learned.settle(self._nearest(self._learned.move(moved, where)))

    def _nearest(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.config.sampler != "fixed_width":
            return self._budget.nearest(z)
        parts = []
        for group, width in zip(self.groups, self._uniform_widths(), strict=True):
            lower = min(self._bounds[0], width / group.size)
            parts.append(nearest(z[group.start : group.stop], width, lower, self._bounds[1]))
        return np.concatenate(parts)

    def _caps(self) -> tuple[int, int, int]:
        """Most atoms, parameters (0 if these are not known) and FLOPs (0 if another budget) of a mask."""
        config, costs, budget = self.config, self._costs, self._budget
        atoms = self.num_atoms
        if config.budget == "count":
            wanted = math.ceil(config.hard_cap * budget.limit - 1e-9)
            atoms = min(atoms, max(wanted, minimum_size(self.groups, config.min_width)))
        if costs is None:
            return atoms, 0, 0
        uniform = self._evenly_narrowed(1.0 if self.trivial else float(budget.start().mean()))
        room = config.hard_cap**2
        parameters = min(costs.dense_parameters, math.ceil(room * costs.parameters(uniform)))
        flops = min(costs.dense_flops, math.ceil(room * costs.flops(uniform)))
        return atoms, parameters, flops if config.budget == "flops" else 0

    def _evenly_narrowed(self, ratio: float) -> Tensor:
        """Every group narrowed to this ratio, rounded up."""
        mask = torch.zeros(self.num_atoms, dtype=torch.bool)
        for group in self.groups:
            width = min(group.size, max(self.config.min_width, math.ceil(ratio * group.size - 1e-9)))
            mask[group.start : group.start + width] = True
        return mask

    def _build_sampler(self) -> Sampler:
        config = self.config
        if config.sampler == "fixed_width":
            return FixedWidth(self.groups, self._uniform_widths(), self.seed)
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
        place = torch.empty(group.size, dtype=torch.float64)
        order = importance[inside].argsort(descending=True, stable=True)
        place[order] = (torch.arange(group.size, dtype=torch.float64) + 0.5) / group.size
        slope = 0.9 * min(mean, 1 - mean) * (1 - 2 * place)
        tilted[inside] = (1 - _OPEN) * (place < mean) + _OPEN * (mean + slope)
    return tilted
