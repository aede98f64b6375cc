"""Widths: what turns a draw, or a ranking of the atoms, into a mask that a network can use.

A group never falls below its minimum width (an empty group would disconnect the network), and a mask never
keeps more than a hard cap (its size decides how much memory the subnet takes). Atoms go by their margin, so
that a mask stays a function of (s, seed, round).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group


def minimum_size(groups: Sequence[Group], min_width: int) -> int:
    """Atoms that every mask keeps: the sum of min(min_width, size) over the groups."""
    return sum(min(min_width, group.size) for group in groups)


def respect_widths(
    mask: Tensor, s: Tensor, groups: Sequence[Group], min_width: int, cap: int, margin: Tensor
) -> Tensor:
    """The draw made usable: every group keeps its minimum width, the whole mask at most ``cap`` atoms.

    A group that is too narrow is filled with its most probable atoms (ties: the lower index). Above the cap,
    those kept atoms go that were closest to not being drawn (largest margin; ties: the higher index), none
    below the minimum width. Returns a new bool[C]. Raises ValueError: ``cap`` is smaller than the sum of the
    minimum widths.

    Args:
        mask: bool[C], the draw; it is not changed.
        s: float64[C], the keep probabilities.
        min_width: smallest width of a group; a smaller group is kept whole.
        margin: float64[C], how readily an atom goes."""
    needed = minimum_size(groups, min_width)
    if cap < needed:
        raise ValueError(f"a cap of {cap} atoms is below the {needed} of the minimum widths; raise the cap")
    kept = mask.clone()
    found = np.add.reduceat(mask.numpy(), [group.start for group in groups], dtype=np.int64)
    for group in compress(groups, found < min_width):
        _fill(kept[group.start : group.stop], s[group.start : group.stop], min_width)
    surplus = int(kept.sum()) - cap
    if surplus > 0:
        kept[_droppable(kept, margin, groups, min_width)[:surplus]] = False
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
    ``size(mask)``, its parameters, is above ``cap``; none below the minimum width. Returns the mask itself if
    it fits, else a new bool[C] without the fewest atoms (all that may go, if that is not enough)."""
    if size(mask) <= cap:
        return mask
    order = _droppable(mask, margin, groups, min_width)

    def without(count: int) -> Tensor:
        kept = mask.clone()
        kept[order[:count]] = False
        return kept

    fits = bisect_left(range(len(order)), True, key=lambda count: size(without(count)) <= cap)
    return without(fits)


def of_expected_widths(
    s: Tensor, margin: Tensor, groups: Sequence[Group], min_width: int, fits: Callable[[Tensor], bool]
) -> Tensor:
    """The mask bool[C] whose groups are as wide, relative to each other, as a draw from s is in the mean;
    dropping an atom never makes ``fits``, the budget, false. In each group those of the largest ``margin`` go
    first (ties: the higher index).

    The width of a small group varies a lot from draw to draw, and a network lives with its narrowest layer: a
    mask to keep has the widths of the distribution, and only its atoms are a matter of the draw. Before
    anything is learned it is a uniformly narrowed network."""
    place = torch.zeros(len(s), dtype=torch.float64)
    for group in groups:
        inside = slice(group.start, group.stop)
        order = margin[inside].argsort(stable=True)
        ranks = torch.arange(group.size, dtype=torch.float64) + 0.5
        place[group.start + order] = ranks / s[inside].sum().clamp_min(1e-12)
    return first_that_fit(place.argsort(stable=True), groups, min_width, fits)


def first_that_fit(
    order: Tensor, groups: Sequence[Group], min_width: int, fits: Callable[[Tensor], bool]
) -> Tensor:
    """The mask bool[C] of the first atoms of a ranking of all, int64[C], as many as fit; dropping an atom
    never makes ``fits``, the budget, false. The minimum widths come first. When the next atom does not fit,
    the next one of any other group that does is still taken, since the atoms of groups differ in what they
    cost; so that none becomes wide by what a dear one leaves, by a tenth of its width or one atom at most."""
    number = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([g.size for g in groups]))
    kept = torch.zeros(len(order), dtype=torch.bool)
    for group in groups:
        inside = (order >= group.start) & (order < group.stop)
        kept[order[inside][:min_width]] = True
    rest = order[~kept[order]]

    def with_first(count: int) -> Tensor:
        mask = kept.clone()
        mask[rest[:count]] = True
        return mask

    count = bisect_left(range(1, len(rest) + 1), True, key=lambda n: not fits(with_first(n)))
    mask = with_first(count)
    room = [max(1, int(mask[group.start : group.stop].sum()) // 10) for group in groups]
    for atom in rest[count:].tolist():
        if not any(room):
            break
        if room[place := int(number[atom])]:
            mask[atom] = True
            room[place] -= 1
            if not fits(mask):
                mask[atom], room[place] = False, 0
    return mask


def of_least_margin(mask: Tensor, margin: Tensor, groups: Sequence[Group]) -> Tensor:
    """The mask bool[C] of the widths of ``mask`` that keeps the atoms with the smallest margins."""
    kept = torch.zeros_like(mask)
    for group in groups:
        inside = slice(group.start, group.stop)
        kept[group.start + margin[inside].argsort(stable=True)[: int(mask[inside].sum())]] = True
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
