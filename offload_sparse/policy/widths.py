"""Widths: what turns a draw, or a ranking of the atoms, into a mask that a network can use.

Every group keeps an atom (an empty one would disconnect the network), and a mask never keeps more than a hard
cap (its size decides how much memory the subnet takes). Atoms go by their margin, so that a mask stays a
function of (s, seed, round).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group


def respect_widths(mask: Tensor, s: Tensor, groups: Sequence[Group], cap: int, margin: Tensor) -> Tensor:
    """The draw made usable: every group keeps an atom, the whole mask at most ``cap`` atoms.

    An empty group gets its most probable atom (ties: the lower index). Above the cap, those kept atoms go
    that were closest to not being drawn (largest margin; ties: the higher index), none that its group has
    alone. Returns a new bool[C].

    Args:
        mask: bool[C], the draw; it is not changed.
        s: float64[C], the keep probabilities.
        cap: at least one atom per group.
        margin: float64[C], how readily an atom goes."""
    kept, starts = mask.clone(), [group.start for group in groups]
    for group in compress(groups, ~np.logical_or.reduceat(mask.numpy(), starts)):
        kept[group.start + int(s[group.start : group.stop].numpy().argmax())] = True
    surplus = int(kept.sum()) - cap
    if surplus > 0:
        kept[_droppable(kept, margin, groups)[:surplus]] = False
    return kept


def respect_size(
    mask: Tensor, margin: Tensor, groups: Sequence[Group], size: Callable[[Tensor], int], cap: int
) -> Tensor:
    """A mask whose subnet is small enough: atoms go, those with the largest ``margin`` first, while
    ``size(mask)``, its parameters, is above ``cap``; none that its group has alone. Returns the mask itself
    if it fits, else a new bool[C] without the fewest atoms (all that may go, if that is not enough)."""
    if size(mask) <= cap:
        return mask
    order = _droppable(mask, margin, groups)

    def without(count: int) -> Tensor:
        kept = mask.clone()
        kept[order[:count]] = False
        return kept

    return without(bisect_left(range(len(order)), True, key=lambda count: size(without(count)) <= cap))


def of_expected_widths(
    s: Tensor, margin: Tensor, groups: Sequence[Group], least: int, fits: Callable[[Tensor], bool]
) -> Tensor:
    """The mask bool[C] whose groups are as wide, relative to each other, as a draw from s is in the mean, but
    of ``least`` atoms at least; dropping an atom never makes ``fits``, the budget, false. In each group those
    of the largest ``margin`` go first (ties: the higher index).

    The width of a small group varies a lot from draw to draw, and a network lives with its narrowest layer: a
    mask to keep has the widths of the distribution, and only its atoms are a matter of the draw. Before
    anything is learned it is a uniformly narrowed network."""
    place = torch.zeros(len(s), dtype=torch.float64)
    kept = torch.zeros(len(s), dtype=torch.bool)
    for group in groups:
        inside = slice(group.start, group.stop)
        order = margin[inside].argsort(stable=True)
        ranks = torch.arange(group.size, dtype=torch.float64) + 0.5
        place[group.start + order] = ranks / s[inside].sum().clamp_min(1e-12)
        kept[group.start + order[:least]] = True
    ranking = place.argsort(stable=True)
    return _filled(kept, ranking[~kept[ranking]], groups, fits)


def _filled(kept: Tensor, rest: Tensor, groups: Sequence[Group], fits: Callable[[Tensor], bool]) -> Tensor:
    """The mask ``kept`` with the first atoms of a ranking of the ``rest``, int64, as many as fit. When the
    next atom does not fit, the next one of any other group that does is still taken, since the atoms of
    groups differ in what they cost; so that none becomes wide by what a dear one leaves, by a tenth of its
    width or one atom at most."""
    number = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([g.size for g in groups]))

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


def _droppable(kept: Tensor, margin: Tensor, groups: Sequence[Group]) -> Tensor:
    """int64: kept atoms beyond the first of their group, those first that go first."""
    spare = []
    for group in groups:
        atoms = group.start + kept[group.start : group.stop].nonzero().flatten()
        spare.append(atoms[margin[atoms].argsort(stable=True)[1:]])
    atoms = torch.cat(spare).sort().values.flip(0)
    return atoms[margin[atoms].argsort(descending=True, stable=True)]
