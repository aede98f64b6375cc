"""``WidthSearch``: one mask at a time, and cycles of training, probing and moving its widths.

    | train, lr down to 0 | probe, move | train … | probe, move | … | train what was found, to the end |
    0                   cycle 1                 cycle 2        freeze_step

Without cycles it is one even mask for the whole run. To the engine it is a policy like ``MaskPolicy``: the
two masks of a round are the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.policy.budget import Budget, bisected
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.probe import (
    Comparisons,
    Worth,
    move,
    present_widths,
    probe_pair,
    probe_rates,
    stages,
)
from offload_sparse.policy.published_widths import static_mask
from offload_sparse.policy.widths import respect_size

CYCLES = 4
_HISTORY = ("widths", "loss_per_cost", "error", "advantage", "moved_to")
PAIRS_PER_GROUP, LEAST_PAIRS_PER_GROUP = 18, 4
"""Pairs of a probe, and the fewest that a cycle is worth having for."""

MEMORY_ROOM = 1.4
"""Most that the layers of moved widths may put out, relative to those of the first widths: what a step holds
on the device goes with it, and a search must not end for want of memory."""

_STEPS = (1.0, 0.5, 0.25, 0.125)
"""Shares of a move, of which the first is taken that has this room."""

PROBE_SHARE = 0.1
"""Most that all probes may cost, relative to training: a pair is two forward passes, a step is three."""


def cycles_and_pairs(
    groups: int, freeze_step: int, total_steps: int, cycle_steps: int = PolicyConfig.cycle_steps
) -> tuple[int, int]:
    """How many cycles of at least ``cycle_steps`` a search in the first ``freeze_step`` of ``total_steps``
    steps has, or one shorter one, and the pairs of each probe on a rank. One group has none to trade with."""
    time_for = max(freeze_step // cycle_steps, int(freeze_step >= PolicyConfig.least_steps))
    affordable = 1.5 * PROBE_SHARE * total_steps / groups  # pairs per group
    cycles = min(CYCLES, int(affordable / LEAST_PAIRS_PER_GROUP), time_for) if groups > 1 else 0
    return cycles, int(groups * min(PAIRS_PER_GROUP, affordable / max(1, cycles)))


class WidthSearch:
    """A mask whose widths move between cycles of training, at a constant cost.

    Args:
        seed: of the probes' masks; equal on all ranks.
        freeze_step: step at which the last cycle begins.
        total_steps: of the run; 0 searches nothing.
        first: bool[C], a mask of the widths of the first round, which a search scales to its budget; None for
            even ones.

    Attributes:
        trivial: the mask of every round keeps everything.
        stays: the masks of all rounds are the same, as there is no cycle.
        mask: bool[C], of the subnet that is trained.
        trained: bool[C], atoms that have been in a mask.
        size_cap: most parameters that a mask of the run has.
        boundaries: steps at which the widths move.
        pairs: of each probe, on each rank.
        entropy: of the mask as a probability.
        history: float64[probes, 5, G]: of each probe the widths before, the loss per share of the cost, its
            standard error, the shrunk advantage over the mean, and the widths after."""

    entropy = 0.0

    def __init__(
        self,
        config: PolicyConfig,
        groups: Sequence[Group],
        seed: int,
        costs: CostModel,
        freeze_step: int = 0,
        total_steps: int = 0,
        importance: Tensor | None = None,
        first: Tensor | None = None,
    ) -> None:
        self.config, self.groups, self.seed = config, tuple(groups), seed
        self.trivial = config.rho == 1 and not config.budgets and first is None
        self._sizes = torch.tensor([g.size for g in self.groups], dtype=torch.float64)
        self._per_atom = torch.repeat_interleave(torch.arange(len(self.groups)), self._sizes.long())
        self._budget = Budget.of(config, self.groups, costs)
        start = self._budget.start()
        start = torch.ones_like(start) if self.trivial else start
        self._margin = 1 - start if importance is None else -importance
        self.mask = self._budget.mask(start, self._margin) if first is None else first
        widths = start[[g.start for g in self.groups]] * self._sizes
        self._log_widths = (widths if first is None else present_widths(first, self.groups)).log()
        searched = 0 if self.trivial else freeze_step
        cycles, self.pairs = cycles_and_pairs(len(self.groups), searched, total_steps, config.cycle_steps)
        self.boundaries = [freeze_step * number // cycles for number in range(1, cycles + 1)]
        self.stays = not cycles
        self._moves_in = self._budget.to_move_in(self._margin) if cycles else self._budget
        if cycles and first is not None:
            self._log_widths = self._affordable(self._log_widths, self._moves_in)
            self.mask = self._moves_in.mask(self._rates_of(self._log_widths), self._margin)
        self.trained = self.mask.clone()
        self._worth = Worth(stages(self.groups, self._moves_in.slopes(torch.ones_like(start))))
        self._history = torch.full((cycles, len(_HISTORY), len(self.groups)), torch.nan).double()
        self._costs, self._most_outputs = costs, MEMORY_ROOM * costs.outputs(self.mask)
        self._first, self._most_of_family, self.size_cap = self._log_widths, math.inf, costs.dense_parameters
        if config.budgets:
            self._most_of_family = MEMORY_ROOM * costs.outputs(self.family()[-1])
        self.size_cap = self._largest()

    # --- what the engine asks of a policy ---

    @property
    def s(self) -> Tensor:
        """The mask as keep probabilities, float64[C]."""
        return self.mask.to(torch.float64)

    def sample(self, round: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The present mask, twice."""
        return self.mask, self.mask

    def candidates(self, count: int, round: int = 0) -> list[Tensor]:  # noqa: ARG002
        return [self.family()[-1]]

    def family(self) -> list[Tensor]:
        """bool[C] of every member of ``policy.budgets``, the smallest first: the present widths, scaled, of
        which each has the channels of those before it; nearer to the first ones where the largest has not
        room. Without budgets the present mask."""
        masks = [self.mask]
        for share in (*_STEPS, 0.0) if self.config.budgets else ():
            masks = self._members(self._first.lerp(self._log_widths, share))
            if self._costs.outputs(masks[-1]) <= self._most_of_family:
                break
        return masks

    def _members(self, log_widths: Tensor) -> list[Tensor]:
        masks: list[Tensor] = []
        for share in sorted(self.config.budgets):
            budget = self._budget.at(share)
            budget = budget.to_move_in(self._margin) if len(self.history) else budget
            mask = budget.mask(self._rates_of(self._affordable(log_widths, budget)), self._margin)
            masks.append(mask | masks[-1] if masks else mask)
        size = self._costs.parameters
        largest = respect_size(masks[-1], self._margin, self.groups, size, self.size_cap)
        return [mask & largest for mask in masks]

    def report(self) -> dict[str, Any]:
        """Keep ratio per group, and the probes so far."""
        ratios = (present_widths(self.mask, self.groups) / self._sizes).tolist()
        kept = {g.name: ratio for g, ratio in zip(self.groups, ratios, strict=True)}
        probes = [dict(zip(_HISTORY, probe.tolist(), strict=True)) for probe in self.history]
        return {"group_keep": kept} | ({"probes": probes} if probes else {})

    @property
    def history(self) -> Tensor:
        return self._history[~self._history[:, 0, 0].isnan()]

    # --- probing and moving ---

    def cycle(self, step: int, total_steps: int, ended: int | None = None) -> tuple[int, int]:
        """First step of the cycle that ``step`` is in, and of the next one; the last one begins where the
        search has ``ended``, if it has, or will."""
        edges = [0, *self.boundaries, total_steps]
        if ended is not None and self.boundaries:  # before its time, or in a run that was to be shorter
            edges = [0, *(edge for edge in self.boundaries if edge < ended), ended, total_steps]
        return max(e for e in edges[:-1] if e <= step), min(e for e in edges[1:] if e > step)

    def rates(self) -> Tensor:
        """δ float64[G] of the present widths."""
        return probe_rates(self._slopes())

    def pair(self, number: int, rates: Tensor) -> tuple[Tensor, Tensor]:
        """m and m' of a pair of the next probe, bool[C]."""
        return probe_pair(self.mask, self.groups, rates, self.seed, number, len(self.history))

    def move(self, found: Comparisons, importance: Tensor) -> None:
        """Take in a probe, the comparisons of all ranks, and move the widths; too few comparisons (the losses
        were not finite) move none. Of a group that shrinks, the least important atoms (float64[C]) leave; one
        that grows gets back atoms that were trained before, then new ones."""
        if found.count <= len(self.groups) + 1:
            return
        before = present_widths(self.mask, self.groups)
        slopes, cost = self._slopes(), self._moves_in.spent(self._rates_of(before.log()))
        values, errors = found.regressed()
        self._worth.observe(values, errors, slopes, cost)
        advantage, spread = self._worth.advantage()
        # Fractions of an atom add up over cycles; what the rounding to atoms has given away does not.
        start = torch.minimum(torch.maximum(self._log_widths, (before - 0.5).log()), (before + 0.5).log())
        wanted = move(advantage, spread, slopes, cost)
        order = torch.where(self.mask, importance / importance.max().clamp_min(1e-30), -1.0)
        margin = self._margin = -torch.where(~self.mask & self.trained, -0.5, order)
        for share in _STEPS:
            log_widths = self._affordable(start + share * wanted, self._moves_in)
            mask = self._moves_in.mask(self._rates_of(log_widths), margin)
            mask = respect_size(mask, margin, self.groups, self._costs.parameters, self.size_cap)
            if self._costs.outputs(mask) <= self._most_outputs:
                self.mask, self._log_widths = mask, log_widths
                break
        self.trained |= self.mask
        per_cost, after = cost / slopes, present_widths(self.mask, self.groups)
        row = torch.stack([before, values * per_cost, errors * per_cost, advantage, after])
        if len(self.history) == len(self._history):  # of a run that was shorter when it began
            self._history = torch.cat([self._history, torch.full_like(row, torch.nan)[None]])
        self._history[len(self.history)] = row

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that has been found; configuration and seed are the caller's."""
        tensors = {"s": self.s, "trained": self.trained, "log_widths": self._log_widths}
        tensors |= {"precision": self._worth.precision, "weighted": self._worth.weighted}
        tensors |= {"history": self._history, "margin": self._margin}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from ``state_dict()`` bit for bit. Raises ValueError: the state belongs to another model."""
        if tensors["s"].shape != self.mask.shape or "log_widths" not in tensors:
            raise ValueError(
                "the saved masks are not those of a width search of this model; load a checkpoint of the "
                "same model with policy.search probe"
            )
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        self.mask, self.trained = found["s"] > 0, found["trained"]
        self._log_widths, self._margin, self._history = found["log_widths"], found["margin"], found["history"]
        self._worth.precision, self._worth.weighted = found["precision"], found["weighted"]

    # --- parts ---

    def _rates_of(self, log_widths: Tensor) -> Tensor:
        """Keep rate of every atom, float64[C]."""
        return (log_widths.exp().clamp_min(1.0) / self._sizes).clamp_max(1.0)[self._per_atom]

    def _slopes(self) -> Tensor:
        return self._moves_in.slopes(self._rates_of(present_widths(self.mask, self.groups).log()))

    def _affordable(self, log_widths: Tensor, budget: Budget) -> Tensor:
        """The same widths times the one factor that spends ``budget``."""

        def fits(shift: float) -> bool:
            return budget.spent(self._rates_of(log_widths + shift)) <= budget.limit

        return log_widths + bisected(-10.0, 10.0, fits)[0]

    def _largest(self) -> int:
        """Parameters of the first mask, or of the largest member, with room for moves, within the whole
        network."""
        first = max(map(self._costs.parameters, (self.mask, self.family()[-1])))
        if self.stays:
            return first
        room = 1.05 if self.config.budget == "params" else self.config.hard_cap**4
        return int(min(self._costs.dense_parameters, room * first))


def build_policy(
    config: PolicyConfig,
    channel_map: ChannelMap,
    seed: int,
    costs: CostModel,
    freeze_step: int | None,
    total_steps: int | None,
    importance: Tensor | None = None,
    widths: str = "",
) -> MaskPolicy | WidthSearch:
    """The policy that ``config.search`` names. Raises ValueError: a search that ends at a share of a run must
    know its length; an atom of every group exceeds the budget; no search that ``config`` names begins with
    ``widths``, or they do not fit.

    Args:
        freeze_step: step at which the final mask is chosen; None without an end of the run.
        total_steps: of the run, if it is known.
        importance: float64[C], by which the atoms are ranked at the start; None tells none apart.
        widths: that the first mask has, see ``static_mask``; empty for even ones."""
    if config.search in ("forward", "probe") and (freeze_step is None or total_steps is None):
        raise ValueError(f"policy.search {config.search} ends at a share of a run; give total_steps")
    groups = channel_map.groups
    if config.search in ("sampled", "forward"):
        if widths:
            raise ValueError(
                f"policy.search is {config.search}, which begins with no widths; leave out static.widths, or "
                "choose policy.search probe or none, or method static"
            )
        return MaskPolicy(config, groups, seed, costs, importance)
    steps = (freeze_step or 0, total_steps or 0) if config.search == "probe" else (0, 0)
    margin = None if importance is None else -importance
    first = static_mask(widths, config, channel_map, costs, margin) if widths.strip(", ") else None
    return WidthSearch(config, groups, seed, costs, *steps, importance, first)
