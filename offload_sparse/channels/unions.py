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
        self._members: list[tuple[int, ...]] = []
        self._number: dict[tuple[int, ...], int] = {}

    def of(self, left: int, right: int) -> int:
        """The id of the union of two ids."""
        if ALWAYS in (left, right):
            return ALWAYS
        members = tuple(sorted({*self._atoms(left), *self._atoms(right)}))
        if len(members) == 1:
            return members[0]
        if members not in self._number:
            self._number[members] = self._num_atoms + len(self._members)
            self._members.append(members)
        return self._number[members]

    def _atoms(self, number: int) -> tuple[int, ...]:
        return (number,) if number < self._num_atoms else self._members[number - self._num_atoms]

    def pairs(self) -> Tensor:
        """int64[2, members]: (union, atom), the form that a channel map keeps."""
        pairs = [(u, atom) for u, members in enumerate(self._members) for atom in members]
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
        if bool((ids[classes][free] >= 0).any()) or bool((done & ~dense)[classes].any()):
            raise ValueError(
                f"the sum in {name.rpartition('.')[0] or 'the network'} is tied to other channels than those "
                "that it adds; use residual=coupled or residual=internal"
            )
        out = torch.tensor([unions.of(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)])
        out = torch.where(free, out, ALWAYS)
        ids[classes] = out
        done[classes] = True
        if bool((torch.stack([left, right, out]) != ALWAYS).any()):
            found[name] = Addition(left, right, out)
    return ids, unions.pairs(), found
