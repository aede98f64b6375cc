"""Samplers: from keep probabilities to masks, the same on every rank.

A raw draw keeps atom c where u_c < s_c for one uniform u_c per atom. Two rules then repair draws that a
network cannot use: a group never falls below its minimum width (an empty group would disconnect the network),
and a mask never keeps more than a hard cap (its size decides how much memory the subnet takes). Both use the
same u, so that a mask stays a function of (s, seed, round).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload_sparse.structure.channel_map import Group

_MASK64 = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """A 64-bit integer mixed into another that looks random (Steele et al. 2014, one step of SplitMix)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def mask_generator(seed: int, round: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of one draw, a function of its arguments alone: ranks agree without communication.

    Args:
        seed: seed of the run.
        round: index of the round (or of a candidate).
        stream: which of several independent draws of that round.
    """
    mixed = 0
    for part in (seed, round, stream):
        mixed = splitmix64(mixed ^ (part & _MASK64))
    # The CPU generator reads the low 32 bits of a seed only; every bit of `mixed` depends on all arguments.
    return torch.Generator().manual_seed(mixed & 0xFFFFFFFF)


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """One u ~ U[0, 1) per atom: float64[count]."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


def bernoulli(s: Tensor, generator: torch.Generator) -> Tensor:
    """A raw draw m ~ Bern(s): bool[C] from s = float64[C]; no minimum width, no cap."""
    return uniforms(len(s), generator) < s


def minimum_size(groups: Sequence[Group], min_width: int) -> int:
    """Atoms that every mask keeps: the sum of min(min_width, size) over the groups."""
    return sum(min(min_width, group.size) for group in groups)


def respect_widths(
    mask: Tensor, s: Tensor, groups: Sequence[Group], min_width: int, cap: int, u: Tensor
) -> Tensor:
    """The draw made usable: every group keeps its minimum width, the whole mask at most ``cap`` atoms.

    A group that is too narrow is filled with its most probable atoms (ties: the lower index). Above the cap,
    those kept atoms go that were closest to not being drawn (largest u/s; ties: the higher index), none below
    the minimum width.

    Args:
        mask: bool[C], the draw; it is not changed.
        s: float64[C], the keep probabilities.
        groups: the groups of the atoms.
        min_width: smallest width of a group; a smaller group is kept whole.
        cap: most atoms that the result may keep.
        u: float64[C], the uniforms of the draw.

    Returns:
        A new bool[C].

    Raises:
        ValueError: ``cap`` is smaller than the sum of the minimum widths.
    """
    needed = minimum_size(groups, min_width)
    if cap < needed:
        raise ValueError(f"a cap of {cap} atoms is below the {needed} of the minimum widths; raise the cap")
    kept = mask.clone()
    for group in groups:
        _fill(kept[group.start : group.stop], s[group.start : group.stop], min_width)
    surplus = int(kept.sum()) - cap
    if surplus > 0:
        kept[_droppable(kept, u / s, groups, min_width)[:surplus]] = False
    return kept


def respect_size(
    mask: Tensor,
    margin: Tensor,
    groups: Sequence[Group],
    min_width: int,
    size: Callable[[Tensor], int],
    cap: int,
) -> Tensor:
    """A mask whose subnet is small enough: atoms go, those with the largest ``margin`` first, while
    ``size(mask)`` is above ``cap``; none below the minimum width.

    Args:
        mask: bool[C]; it is not changed.
        margin: float64[C], how readily an atom goes.
        groups: the groups of the atoms.
        min_width: smallest width of a group.
        size: parameters of the subnet of a mask; dropping an atom never raises it.
        cap: most parameters.

    Returns:
        The mask itself if it fits, else a new bool[C] without the fewest atoms (all that may go, if that is
        not enough).
    """
    if size(mask) <= cap:
        return mask
    order = _droppable(mask, margin, groups, min_width)

    def without(count: int) -> Tensor:
        kept = mask.clone()
        kept[order[:count]] = False
        return kept

    fits = bisect_left(range(len(order)), True, key=lambda count: size(without(count)) <= cap)
    return without(fits)


def most_probable(s: Tensor, groups: Sequence[Group], budget: float, min_width: int) -> Tensor:
    """The mask of the most probable atoms: bool[C] with at most ``budget`` atoms (or the minimum widths, if
    they are more).

    The minimum widths come first, then the atoms in falling order of s. Equally probable atoms are taken
    evenly from all groups (by their rank relative to the group's size, then by index): before anything is
    learned, the mask is a uniformly narrowed network and not one whose first layers are whole.
    """
    kept = torch.zeros(len(s), dtype=torch.bool)
    rank = torch.zeros(len(s), dtype=torch.float64)
    for group in groups:
        order = s[group.start : group.stop].argsort(descending=True, stable=True)
        rank[group.start + order] = torch.arange(1, group.size + 1, dtype=torch.float64) / group.size
        kept[group.start + order[:min_width]] = True
    evenly = rank.argsort(stable=True)
    order = evenly[s[evenly].argsort(descending=True, stable=True)]
    order = order[~kept[order]]
    room = max(0, int(budget + 1e-9) - int(kept.sum()))
    kept[order[:room]] = True
    return kept


def _fill(kept: Tensor, s: Tensor, min_width: int) -> None:
    """Fill one group (bool[size], changed in place) up to its minimum width."""
    missing = min(min_width, len(kept)) - int(kept.sum())
    if missing > 0:
        order = s.argsort(descending=True, stable=True)
        kept[order[~kept[order]][:missing]] = True


def _droppable(kept: Tensor, margin: Tensor, groups: Sequence[Group], min_width: int) -> Tensor:
    """int64: kept atoms beyond the minimum width of their group, those first that go first."""
    spare = []
    for group in groups:
        atoms = group.start + kept[group.start : group.stop].nonzero().flatten()
        spare.append(atoms[margin[atoms].argsort(stable=True)[min_width:]])
    atoms = torch.cat(spare).sort().values.flip(0)
    return atoms[margin[atoms].argsort(descending=True, stable=True)]
