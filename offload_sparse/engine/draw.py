"""The masks of a round: of subnet a, and of subnet b on every rank (one for all, or one for each)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.engine.transfers import Masks
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store.weight_store import Ranks

Draw = tuple[Tensor, ...]
"""bool[C] each: the mask of a, then those of b."""


@dataclass(frozen=True)
class OpenRound:
    """A round in the middle, as far as the store does not hold it.

    Attributes:
        masks: of subnet a, and of b (one for all ranks, or one for each).
        steps: steps made.
        length: steps in all.
        statistics: flat BatchNorm statistics of the trained subnets on this rank.
    """

    masks: Draw
    steps: int
    length: int
    statistics: list[Tensor]


def sample(policy: MaskPolicy, number: int, references: int) -> Draw:
    """The masks of round ``number``, with so many references; a function of s, the seed and the number."""
    return policy.sample(number) if references == 1 else policy.sample_for_ranks(number, references)


def pair_on(draw: Draw, rank: int) -> tuple[Tensor, Tensor]:
    """The masks of subnets a and b on ``rank``."""
    return draw[0], draw[1 + rank % (len(draw) - 1)]


def resolve(
    draw: Draw,
    channel_map: ChannelMap,
    ranks: Ranks,
    references: Literal["shared", "per_rank"],
    train_second: bool,
) -> Masks:
    """The selections of a draw on this rank.

    Args:
        draw: the masks.
        channel_map: the map of the full network.
        ranks: the ranks that share the store.
        references: whether each rank has a reference of its own.
        train_second: subnet b takes turns in training.
    """
    first = Selection(channel_map, draw[0])
    if references == "shared":
        return Masks(first, Selection(channel_map, draw[1]), train_second)
    everyone = range(ranks.first, ranks.first + ranks.world_size)
    selections = tuple(Selection(channel_map, pair_on(draw, rank)[1]) for rank in everyone)
    return Masks(first, selections[ranks.rank], per_rank=selections)
