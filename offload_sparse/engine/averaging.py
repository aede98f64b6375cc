"""What ranks that have trained by themselves agree on at the end of a round, in their owners' rows.

    rank 0    narrow buffer  | own rows of 0 | own rows of 1 |  ──┐  every owner receives its part of each
    rank 1    narrow buffer  | own rows of 0 | own rows of 1 |  ──┘  rank's buffer: one message per pair
    owner     mean over the ranks that held an entry ─ outer step ─▶ own rows, nobody else's

An entry counts once for each rank that held it, by the steps of the round that the rank had a batch for; one
that no rank held stands still. Everything passes through host memory, where the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sparse.channels.selection import Selection
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.subnet_pair import Piece, Side
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import Narrow, TransferPlan, return_plan, shared_plan
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore

EMA, OUTER = "ema", "outer"
"""Kinds of arrays of the store: the moving average of the weights, and the momentum of the outer step."""


Part = tuple[Piece, dict[str, Tensor], float]
"""What a rank has sent: where its entries lie, by kind those of this rank's rows, and how much they count."""


class Averaging:
    """Brings the subnets of all ranks together; the rows of ``store`` are read (by the outer step of
    ``rounds``), not written.

    Attributes:
        bytes_sent: that this rank has sent to others."""

    def __init__(self, store: WeightStore, ranks: Ranks, rounds: RoundConfig) -> None:
        self._store, self._ranks, self._rounds = store, ranks, rounds
        self.bytes_sent = 0

    @torch.no_grad()
    def agreed(self, sides: Sequence[Side], per_rank: Sequence[Selection], steps: int) -> list[Piece]:
        """What this rank's rows become, as all ranks have trained them: arrays in host memory, of which only
        entries of these rows are defined. Every rank calls it.

        Args:
            sides: what this rank has trained.
            per_rank: the subnet of each rank, if these differ (each then trains one); empty otherwise.
            steps: of this round, those that this rank had a batch for.
        """
        found = []
        for side in sides:
            places = [self._places(side, selection) for selection in per_rank]
            parts = self._exchanged(side, places or [side] * self._ranks.world_size, steps)
            most = max(count for _, _, count in parts)
            held = [(place, part, count / most) for place, part, count in parts if count]
            found += [self._mean(place, held) for place in dict.fromkeys(place for place, _, _ in held)]
        for piece in found if self._rounds.outer_step else ():
            self._step(piece)
        return found

    def _places(self, like: Piece, selection: Selection) -> Piece:
        weights, buffers = (Narrow(selection, at.names, at.step) for at in (like.weights, like.buffers))
        return Piece(weights, buffers, {})

    def _own(self, place: Piece, kind: str, owner: int | None = None) -> slice:
        """The run of a narrow buffer that lies in the rows of ``owner``, by default this rank's."""
        owner = self._store.ranks.rank if owner is None else owner
        partition = self._store.partitions[kind]
        return slice(*partition.segment(place.selection, place.narrow(kind).layout, owner))

    def _exchanged(self, side: Side, places: Sequence[Piece], steps: int) -> list[Part]:
        """From every rank, by kind, its entries of this rank's rows, and behind them its steps. With a store
        per node, each node has an owner that receives them.
        """
        rank, owners = self._ranks.rank, self._store.ranks.world_size
        host = {kind: array.to("cpu") for kind, array in side.arrays.items()}
        owned = [[self._own(place, kind) for kind in host] for place in places]
        lengths = [[*(run.stop - run.start for run in runs), 1] for runs in owned]
        count = torch.tensor([float(steps)], dtype=self._store.dtype)
        leaving = []
        for other in range(len(places)):
            runs = [array[self._own(places[rank], kind, other % owners)] for kind, array in host.items()]
            leaving.append(torch.cat([*runs, count]))
        messages = [count.new_empty(sum(length)) for length in lengths]
        messages[rank] = leaving[rank]
        self.bytes_sent += sum(message.nbytes for message in leaving) - leaving[rank].nbytes
        for work in self._ranks.swap(self._ranks.host_group, leaving, messages):
            work.wait()
        found = []
        for place, message, length in zip(places, messages, lengths, strict=True):
            *runs, count = message.split(length)
            found.append((place, dict(zip(host, runs, strict=True)), float(count)))
        return found

    def _mean(self, place: Piece, parts: Sequence[Part]) -> Piece:
        """Over the ranks that held an entry of ``place``; ranks are added in order, so that every subnet that
        has an entry gives it the same bits.
        """
        arrays = {}
        kinds = list(parts[0][1])
        for alike in ([kind for kind in kinds if kind != BUFFERS], [BUFFERS]):
            sums: dict[str, Tensor | float] = dict.fromkeys(alike, 0.0)
            held: Tensor | float = 0.0
            for other, part, share in parts:
                values: dict[str, Tensor] = part
                there: Tensor | float = 1.0
                if not torch.equal(other.selection.mask, place.selection.mask):
                    values, there = self._shared(place, other, {kind: part[kind] for kind in alike})
                sums = {kind: total + share * values[kind] for kind, total in sums.items()}
                held = held + share * there
            for kind, total in sums.items():
                arrays[kind] = torch.empty(place.narrow(kind).layout.size, dtype=self._store.dtype)
                arrays[kind][self._own(place, kind)] = total / held
        return Piece(place.weights, place.buffers, arrays)

    def _shared(
        self, place: Piece, other: Piece, part: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The entries that ``other`` has, too, zero elsewhere; and where these are (1, else 0)."""
        like = next(iter(part))
        owner = self._store.partitions[like], self._store.ranks.rank
        plan = shared_plan(place.narrow(like), other.narrow(like), owner=owner)
        size, own, theirs = place.narrow(like).layout.size, self._own(place, like), self._own(other, like)
        pairs = []
        for values in (*part.values(), torch.ones_like(part[like])):
            source = values.new_empty(other.narrow(like).layout.size)
            source[theirs] = values
            pairs.append((source, values.new_zeros(size)))
        copy_blocks(plan, pairs)
        *found, there = (target[own] for _, target in pairs)
        return dict(zip(part, found, strict=True)), there

    def _step(self, piece: Piece) -> None:
        """Go on from the weights of the round's begin, which the rows still hold."""
        lr, momentum = self._rounds.outer_lr, self._rounds.outer_momentum
        own, partition = self._own(piece, WEIGHTS), self._store.partitions[WEIGHTS]
        kinds = (WEIGHTS, OUTER) if momentum else (WEIGHTS,)
        rows = {kind: torch.empty_like(piece.arrays[WEIGHTS]) for kind in kinds}
        plan = return_plan(partition, self._store.ranks.rank, piece.weights)
        self._store.fetch((TransferPlan({}, plan), list(rows.items())))
        moved = piece.arrays[WEIGHTS][own] - rows[WEIGHTS][own]
        if momentum:
            piece.arrays[OUTER] = rows[OUTER]
            rows[OUTER][own] = moved + momentum * rows[OUTER][own]
            moved = moved + momentum * rows[OUTER][own]
        piece.arrays[WEIGHTS][own] = rows[WEIGHTS][own] + lr * moved
