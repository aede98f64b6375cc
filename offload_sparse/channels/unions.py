"""What is alive on a residual stream whose filters each have a mask of their own.

    stem ─────────────┬────────── + ──┬─────────── + ── head
    atoms a_p         └ branch 1 ─┘   └ branch 2 ──┘
    alive at p        a_p         a_p ∪ b_p        a_p ∪ b_p ∪ c_p

The kept outputs of a branch are added into the positions of the stream (Zhou et al. 2021 mask every filter by
itself), and whoever reads the stream after an addition reads the union.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import ALWAYS, Addition


class Unions:
    """The sets of atoms that positions of streams stand for, numbered as they come up."""

    def __init__(self, num_atoms: int) -> None:
        self._num_atoms = num_atoms
        self._number: dict[tuple[int, ...], int] = {}
        self._members: dict[int, tuple[int, ...]] = {}

    def of(self, left: int, right: int) -> int:
        """The id of the union of two ids."""
        if left == right:
            return left
        if ALWAYS in (left, right):
            return ALWAYS
        sides = (self._members.get(number, (number,)) for number in (left, right))
        members = tuple(sorted({atom for side in sides for atom in side}))
        number = self._number.setdefault(members, self._num_atoms + len(self._number))
        self._members[number] = members
        return number

    def pairs(self) -> Tensor:
        """int64[2, members]: (union, atom), the form that a channel map keeps."""
        pairs = [(u, atom) for u, members in enumerate(self._number) for atom in members]
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.contiguous()


def follow_additions(
    sums: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    root: Tensor,
    dense: Tensor,
    atoms: Tensor,
    num_atoms: int,
) -> tuple[Tensor, Tensor, dict[str, Addition]]:
    """Give every position behind an addition the union of what is added there. Returns int64[labels + 1], the
    atom or union of each class; the members of the unions; the additions that do not keep everything. Raises
    ValueError: what an addition gives is tied to another sum or to the channels of another layer.

    Args:
        sums: labels of the channels of both operands and of the sum of each addition, in the order in which
            the network computes them; see ``propagation``.
        root: int64[labels + 1], the class of each label.
        dense: bool[labels + 1], classes in which everything is kept.
        atoms: int64[labels + 1], the atom of each class or ``ALWAYS``."""
    ids = atoms.clone()
    unions = Unions(num_atoms)
    done = dense.clone()
    found = {}
    for name, labels in sums.items():
        left, right = (ids[root[side]] for side in labels[:2])
        classes = root[labels[2]]
        free = ~done[classes]
        out = torch.tensor([unions.of(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)])
        out = torch.where(free, out, ALWAYS)
        tied = bool((ids[classes][free] >= 0).any()) or bool((done & ~dense)[classes].any())
        ids[classes] = out
        if tied or not torch.equal(ids[classes], out):
            raise ValueError(
                f"the sum in {name.rpartition('.')[0] or 'the network'} is tied to other channels than those "
                "that it adds; use residual=coupled or residual=internal"
            )
        done[classes] = True
        if bool((torch.stack([left, right, out]) != ALWAYS).any()):
            found[name] = Addition(left, right, out)
    return ids, unions.pairs(), found
