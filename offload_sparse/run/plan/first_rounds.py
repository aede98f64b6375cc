"""The subnets of a run's first rounds: the memory that they take, and what one hands over to the next.

The masks are those that the run itself will draw while s stands where it starts; with ``round.prefetch``
these are exactly the first two rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection, aligned
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.family import own_entries
from offload_sparse.engine.losses import TAIL
from offload_sparse.policy.width_search import WidthSearch, build_policy
from offload_sparse.store.copy.regions import Regions
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS


@dataclass(frozen=True)
class Side:
    """One subnet of a round: its channels, the kinds of arrays that it has, and whether its weights move."""

    selection: Selection
    kinds: tuple[str, ...]
    trained: bool


class FirstRounds:
    """What ``engine.transfers`` will hold and move in the first ``rounds`` rounds of a run, or in the last
    ones of a family, which are larger; ``names`` has, per kind of array, the tensors that it consists of;
    each of several ``ranks`` may have a subnet of its own.

    Attributes:
        family: bool[C] of the masks of a family, or of the one that a search for widths starts with.
        stays: whether the masks of all rounds are the same."""

    def __init__(
        self,
        config: RunConfig,
        channel_map: ChannelMap,
        cost: CostModel,
        names: Mapping[str, tuple[str, ...]],
        rounds: int,
        total_steps: int,
        ranks: int = 1,
    ) -> None:
        self._names = names
        self._step = aligned(getattr(torch, config.train.dtype))
        gaps = {kind: (self._step - 1) * len(tensors) for kind, tensors in names.items()}
        self._whole = {
            kind: _entries(channel_map.shapes, tensors) + gaps[kind] for kind, tensors in names.items()
        }
        chosen = config.policy.resolved(config.compile)
        # A search for widths has room for others where it has time to move them.
        search = config.round.freeze_step(chosen.search, total_steps), total_steps
        seed, widths = config.train.seed, str(config.static.widths)
        policy = build_policy(chosen, channel_map, seed, cost, *search, widths=widths)
        self.capacity = policy.size_cap + own_entries(channel_map) + gaps[WEIGHTS]
        self.family = policy.family() if isinstance(policy, WidthSearch) else []
        self.stays = policy.stays
        self._pairs, self._delta = 1 if self.stays else config.round.pairs, config.round.delta
        trained = tuple(names)
        turns = config.round.reference == "turns" and config.round.k > 1
        self._outer = (WEIGHTS,) if config.round.outer_momentum else ()
        self.own_subnets = config.round.own_subnets and ranks > 1
        self.rounds: list[tuple[Side, ...]] = []
        for number in range(1 if self.stays else rounds):
            masks = self.family[-1:] * 2 or policy.sample(number)  # members train together, by the largest
            first, second = (Selection(channel_map, mask) for mask in masks)
            sides: tuple[Side, ...] = (Side(first, trained, True),)
            if not (self.own_subnets or torch.equal(first.mask, second.mask)):
                sides += (Side(second, trained if turns else (WEIGHTS, BUFFERS), turns),)
            self.rounds.append(sides)

    @cached_property
    def reserved(self) -> int:
        """Entries that are allocated for subnets and gradients."""
        total = 0
        for arrays in self._largest():
            for (_, kind), entries in arrays.items():
                room = self._whole[kind] if kind == BUFFERS else min(self._whole[kind], self.capacity)
                total += max(entries, room)
        return total + max(self.capacity, self._gradients()) + TAIL

    @cached_property
    def touched(self) -> int:
        """Entries of these that are ever written: what takes memory where pages come with their first use."""
        return sum(sum(arrays.values()) for arrays in self._largest()) + self._gradients() + TAIL

    def traffic(self) -> tuple[float, float]:
        """Entries from the rows of all ranks to the device, and back, from one round to the next (means)."""
        if len(self.rounds) == 1:
            return 0.0, 0.0
        steps = list(zip(self.rounds, self.rounds[1:], strict=False))
        fetched = sum(self._fetched(old, new) for old, new in steps)
        returned = sum(self._returned(old, new) for old, new in steps)
        return fetched / len(steps), returned / len(steps)

    def entries(self, side: Side, kind: str) -> int:
        """Entries of one array of a subnet."""
        return side.selection.layout(self._names[kind], self._step).size

    def _largest(self) -> list[dict[tuple[int, str], int]]:
        """Per pair of subnets, by (side, kind): the most entries that the array has."""
        found: list[dict[tuple[int, str], int]] = [{} for _ in range(self._pairs)]
        for number, sides in enumerate(self.rounds):
            arrays = found[number % self._pairs]
            for index, side in enumerate(sides):
                for kind in side.kinds:
                    key = (index, kind)
                    arrays[key] = max(arrays.get(key, 0), self.entries(side, kind))
        return found

    def _gradients(self) -> int:
        return max(self.entries(s, WEIGHTS) for sides in self.rounds for s in sides if s.trained)

    def _fetched(self, old: Sequence[Side], new: Sequence[Side]) -> int:
        """What no subnet on the device holds; without delta transfer none is left of the round before."""
        before = [s for s in old if s.trained] + [s for s in old if not s.trained] if self._delta else []
        total = 0
        for side in new:
            for kind in side.kinds:
                holders = [holder.selection for holder in before if kind in holder.kinds]
                total += self._missing(side, kind, holders)
            before.append(side)
        return total

    def _returned(self, old: Sequence[Side], new: Sequence[Side]) -> int:
        """What has been trained and is trained no more."""
        keepers = [side.selection for side in new if side.trained] if self._delta else []
        total = 0
        for side in (s for s in old if s.trained):
            total += sum(self._missing(side, kind, keepers) for kind in (*side.kinds, *self._outer))
            keepers.append(side.selection)
        return total

    def _missing(self, side: Side, kind: str, holders: Sequence[Selection]) -> int:
        return Regions(side.selection, holders).fetched(self._names[kind])


def _entries(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> int:
    return sum(prod(shapes[name]) for name in names)
