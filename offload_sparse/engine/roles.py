"""Which subnets a round has, which of them a rank trains or evaluates, and when ranks talk."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.subnet_pair import Wanted
from offload_sparse.engine.transfers import Transfers
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.width_search import WidthSearch

Masks = tuple[Tensor, ...]
"""bool[C] each: the mask of subnet a, then those of b (one for all ranks, or one for each); or the mask of
every rank, where each trains a subnet of its own.
"""


class Roles:
    """The part of every rank. With ``round.sync round`` ranks talk once per round from step ``local_from``
    of the run on."""

    def __init__(self, rounds: RoundConfig, world_size: int, local_from: int) -> None:
        self._rounds, self._world_size, self._local_from = rounds, world_size, local_from

    def local(self, first_step: int) -> bool:
        """Whether ranks talk once in the round that begins with this step."""
        return self._rounds.sync == "round" and first_step >= self._local_from

    def own_subnets(self, first_step: int) -> bool:
        """Whether every rank has a subnet of its own in the round (of the search) that begins with it."""
        return self._rounds.own_subnets and self._world_size > 1 and self.local(first_step)

    def number(self, first_step: int) -> int:
        """How many masks the round has that begins with this step."""
        if self.own_subnets(first_step):
            return self._world_size
        return 1 + self._world_size if self._rounds.subnets == "references" else 2

    def drawn(self, policy: MaskPolicy | WidthSearch, number: int, first_step: int) -> Masks:
        """The masks of round ``number``, which begins with this step."""
        subnets = self._rounds.subnets
        if isinstance(policy, WidthSearch):
            return policy.sample(number)
        if self.own_subnets(first_step):
            return policy.sample_subnets(number, self._world_size, disjoint=subnets == "partition")
        if subnets == "references":
            return policy.sample_for_ranks(number, self._world_size)
        return policy.sample(number)

    def at(self, step: int, same: bool) -> tuple[int, int | None]:
        """Which side is trained, and which is evaluated beside it, at a step of a round (0 is a, 1 is b)."""
        if same:
            return 0, None
        if self._rounds.reference == "turns":
            return step % 2, 1 - step % 2
        return 0, 1 if self._rounds.reference == "every_step" or step == 0 else None

    def wanted(self, transfers: Transfers, masks: Masks, length: int, own: bool) -> Wanted:
        """This rank's subnets of a round of the search of ``length`` steps; with ``own``, every rank has one
        of its own."""
        ranks, selection = transfers.store.ranks, transfers.selection
        everyone = range(ranks.first, ranks.first + ranks.world_size)
        if own:
            subnets = tuple(selection(subnet_of(masks, rank)) for rank in everyone)
            return Wanted(subnets[ranks.rank], per_rank=subnets)
        first = selection(masks[0])
        if all(torch.equal(masks[0], mask) for mask in masks[1:]):  # on all ranks, which have to agree
            return Wanted(first)
        if self._rounds.subnets != "references":
            return Wanted(first, selection(masks[1]), self._rounds.reference == "turns" and length > 1)
        selections = tuple(selection(reference_of(masks, rank)) for rank in everyone)
        return Wanted(first, selections[ranks.rank], per_rank=selections)


def subnet_of(masks: Masks, rank: int) -> Tensor:
    """The mask of the subnet that ``rank`` alone trains."""
    return masks[rank % len(masks)]


def reference_of(masks: Masks, rank: int) -> Tensor:
    """The mask of subnet b on ``rank``."""
    return masks[1 + rank % (len(masks) - 1)]
