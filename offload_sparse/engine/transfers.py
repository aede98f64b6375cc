"""From one round's subnets to the next: what stays on the device, what crosses the bus, and when.

    round r     | steps on C ................................ |
    transfers   | return leavers of B | fetch newcomers of D  |
                                                              | carry C -> D (device to device)
    round r + 1                                               | steps on D ...................
    transfers                                                 | return leavers of C | fetch newcomers of E

Two pairs of subnets take turns. Newcomers are entries that the pair in training does not train, so the store
is up to date about them as soon as the leavers of the round before are back, and fetching them while the
steps go on reads nothing stale. What the pair in training does train is carried over after its last step.
With overlap the transfers run on one thread (and one CUDA stream), in the order of the picture; without it,
between the rounds. Without delta transfer there is one pair, which takes half the memory: all of it is
returned, then all of the next one fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offload_sparse.channels.selection import Selection
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.side_stream import SideStream
from offload_sparse.engine.subnet_pair import TAIL, Side, SubnetPair
from offload_sparse.engine.timeline import Timeline
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import Narrow, TransferPlan, fetch_plan, fetch_plan_per_rank, return_plan
from offload_sparse.store.copy.regions import Regions
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, WeightStore


@dataclass(frozen=True)
class Masks:
    """What a round is made of.

    Attributes:
        first: selection of subnet a, which is trained.
        second: selection of subnet b; None when there is nothing to compare.
        train_second: b takes turns in training.
        per_rank: the selections of b on every rank that shares the store, where they differ.
    """

    first: Selection
    second: Selection | None = None
    train_second: bool = False
    per_rank: tuple[Selection, ...] = ()

    def made_into(self, pair: SubnetPair) -> bool:
        """Whether ``pair`` consists of these subnets."""
        second = self.first if self.second is None else self.second
        return pair.holds(self.first.mask, second.mask, self.train_second)


@dataclass
class _Load:
    """Arrays of one side that share a layout and come from the same places.

    Attributes:
        side: the side to fill.
        kinds: its arrays.
        holders: sides with valid entries, in the order that ``plan.carried`` numbers them.
        plan: the moves.
    """

    side: Side
    kinds: list[str]
    holders: tuple[Side, ...]
    plan: TransferPlan


@dataclass
class _Handover:
    """The way from one pair to the next.

    Attributes:
        masks: what the next pair is made of.
        source: the pair of the round before; None when nothing on the device can be used.
        target: the pair to fill.
        loads: how the arrays of the target come about, side a first.
    """

    masks: Masks
    source: SubnetPair | None
    target: SubnetPair
    loads: list[_Load] = field(default_factory=list)


class Relay:
    """Hands the weights from round to round and keeps the store in step.

    Args:
        store: the full weights.
        model: the full model on the meta device.
        optim: the optimizer of the weights.
        device: where the subnets compute.
        capacity: most parameters that a subnet has; the buffers are allocated for them, once.
        delta: leave entries that stay on the device; needs room for two pairs.
        overlap: move entries while a round computes; needs ``delta``.

    Attributes:
        bytes_fetched, bytes_returned: bytes that have left, and come back to, this rank's rows.
        bytes_peak: largest bytes of subnets and gradients so far.
        before_return: called before the store is written to.
        steps_done: optimizer steps of the run, as far as told.
        timeline: when transfers began and ended.
    """

    def __init__(
        self,
        store: WeightStore,
        model: nn.Module,
        optim: OptimConfig,
        device: torch.device,
        capacity: int,
        delta: bool = True,
        overlap: bool = False,
    ) -> None:
        self.store = store
        self._pairs = [SubnetPair(store, model, optim, device, capacity) for _ in range(1 + delta)]
        self._current = 0
        self._reduce_memory = torch.empty(capacity + TAIL, dtype=store.dtype, device=device)
        self._side_stream = SideStream(device) if overlap else None
        self._ahead = False  # the pair in training knows more than the store
        self._prepared: tuple[_Handover, Future[None]] | None = None
        self._returning: Future[None] | None = None
        self.bytes_fetched = 0
        self.bytes_returned = 0
        self.bytes_peak = 0
        self.steps_done = 0
        self.timeline = Timeline(device)
        self.before_return: Callable[[], object] = lambda: None

    @property
    def pair(self) -> SubnetPair:
        """The pair in training."""
        return self._pairs[self._current]

    def compile(self) -> None:
        """Compile the forward passes of all subnets, for the whole run; a new width is compiled anew."""
        for side in (side for pair in self._pairs for side in pair.sides):
            side.module.compile(dynamic=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the subnets in use and of their gradients."""
        gradients = max((s.arrays[WEIGHTS].numel() for s in self.pair.trained if s.arrays), default=0) + TAIL
        in_use = sum(pair.nbytes for pair in self._pairs if pair.loaded)
        return in_use + gradients * self._reduce_memory.element_size()

    def open(self, masks: Masks) -> SubnetPair:
        """The pair of ``masks``, filled and bound, ready to be trained."""
        if not masks.made_into(self.pair):
            if len(self._pairs) == 1:
                self._reload(masks)
            else:
                self._hand_over(masks)
        self.pair.bind(self._gradient_memory())
        self.bytes_peak = max(self.bytes_peak, self.nbytes)
        return self.pair

    def prepare(self, masks: Masks) -> None:
        """Begin to fetch what the next round needs and the present one does not train."""
        if self._side_stream is None:
            return
        handover = _Handover(masks, self._source, self._pairs[1 - self._current])
        self._prepared = handover, self._side_stream.submit(lambda: self._fetch(handover))

    @property
    def ahead(self) -> bool:
        """The pair in training knows more than the store."""
        return self._ahead

    def stepped(self, steps_done: int) -> None:
        """Note that the pair has been trained since the store last saw it."""
        self._ahead = True
        self.steps_done = steps_done

    def settle(self) -> None:
        """Bring the store up to date: after this it holds every weight. The pair stays as it is."""
        self.finish_returns()
        if self._ahead:
            self._return(self.pair, ())
            self._ahead = False

    def scratch(self) -> Side:
        """A side for other uses than training; the next round starts afresh from the store."""
        self.settle()
        self._take_prepared()
        self.pair.loaded = False
        return self.pair.sides[0]

    def forget(self) -> None:
        """Drop what the pair in training has learned since the store was last settled."""
        self._take_prepared()
        self._ahead = False
        self.pair.loaded = False

    def close(self) -> None:
        """Wait for transfers under way and stop their thread."""
        if self._side_stream is not None:
            self._side_stream.close()

    # --- from one pair to the next ---

    @property
    def _source(self) -> SubnetPair | None:
        return self.pair if self.pair.loaded else None

    def _reload(self, masks: Masks) -> None:
        """With one pair: everything back, then everything anew."""
        self.settle()
        handover = _Handover(masks, None, self.pair)
        self._fetch(handover)
        self._carry(handover)

    def _hand_over(self, masks: Masks) -> None:
        handover = self._take_prepared()
        if handover is None or not masks.made_into(handover.target):
            handover = _Handover(masks, self._source, self._pairs[1 - self._current])
            self._fetch(handover)
        self._carry(handover)
        left, self._current = self.pair, 1 - self._current
        current, self._ahead, was_ahead = self.pair, False, self._ahead
        if not was_ahead:
            return
        # Until they are back, only the pair that has been left knows the last values of its leavers.
        if self._side_stream is None:
            self._return(left, current.trained)
        else:
            self._returning = self._side_stream.submit(lambda: self._return(left, current.trained))
        self._ahead = True  # what has been carried over is still newer than the store

    def _take_prepared(self) -> _Handover | None:
        """The handover that was prepared, its fetch done; leavers of the round before are back, too."""
        self.finish_returns()
        if self._prepared is None:
            return None
        handover, pending = self._prepared
        self._prepared = None
        assert self._side_stream is not None
        self._side_stream.wait(pending)
        return handover if handover.source is self._source else None

    def finish_returns(self) -> None:
        """Wait until the leavers of the last round are back."""
        if self._returning is not None:
            assert self._side_stream is not None
            self._side_stream.wait(self._returning)
            self._returning = None

    def _fetch(self, handover: _Handover) -> None:
        masks, target = handover.masks, handover.target
        target.select(masks.first, masks.second, masks.train_second)
        handover.loads = list(self._loads(handover))
        with self.timeline.span("gather"):
            for load in handover.loads:
                arrays = [(kind, load.side.arrays[kind]) for kind in load.kinds]
                self.bytes_fetched += self.store.fetch(load.plan, arrays)
                fault_point("gather", self.steps_done)

    def _carry(self, handover: _Handover) -> None:
        """Copy what the source, or an earlier side of the target, holds. The order of the loads matters."""
        with self.timeline.span("carry"):
            for load in handover.loads:
                for holder, plan in load.plan.carried.items():
                    source = load.holders[holder]
                    copy_blocks(plan, [(source.arrays[kind], load.side.arrays[kind]) for kind in load.kinds])

    def _loads(self, handover: _Handover) -> Iterator[_Load]:
        """How every array of the target comes about.

        Valid entries are held by the trained sides of the source; for kinds that the reference has, by the
        reference, whose own entries equal the store's; and by the sides of the target that come first.
        """
        source = handover.source
        before = [] if source is None else [*source.trained, *source.active]
        for side in handover.target.active:
            groups: dict[tuple[bool, tuple[Side, ...]], list[str]] = {}
            for kind in side.arrays:
                holders = tuple(dict.fromkeys(holder for holder in before if kind in holder.arrays))
                groups.setdefault((kind == BUFFERS, holders), []).append(kind)
            known: dict[tuple[Side, ...], Regions] = {}
            for (_, holders), kinds in groups.items():
                if handover.masks.per_rank:  # every rank must know what the others lack
                    holders = tuple(h for h in holders if h in [pair.sides[0] for pair in self._pairs])
                own = handover.masks.per_rank if side is handover.target.sides[1] else ()
                if not own and holders not in known:
                    known[holders] = Regions(side.selection, [holder.selection for holder in holders])
                yield self._load(side, kinds, holders, own, known.get(holders))
            before.append(side)

    def _load(
        self,
        side: Side,
        kinds: list[str],
        holders: tuple[Side, ...],
        per_rank: tuple[Selection, ...],
        regions: Regions | None,
    ) -> _Load:
        partition, rank = self.store.partitions[kinds[0]], self.store.ranks.rank
        target, places = side.narrow(kinds[0]), [holder.narrow(kinds[0]) for holder in holders]
        if not per_rank:
            return _Load(side, kinds, holders, fetch_plan(partition, rank, target, places, regions))
        targets = [Narrow(selection, target.names) for selection in per_rank]
        return _Load(side, kinds, holders, fetch_plan_per_rank(partition, rank, targets, places))

    def _return(self, left: SubnetPair, keepers: tuple[Side, ...]) -> None:
        """Write this rank's entries of what ``left`` has trained and no side of ``keepers`` carries on."""
        self.before_return()
        with self.timeline.span("scatter"):
            self._put_back(left, keepers)

    def _put_back(self, left: SubnetPair, keepers: tuple[Side, ...]) -> None:
        known = list(keepers)
        for side in left.trained:
            regions = Regions(side.selection, [keeper.selection for keeper in known])
            for kinds in ([k for k in side.arrays if k != BUFFERS], [BUFFERS]):
                partition, rank = self.store.partitions[kinds[0]], self.store.ranks.rank
                places = [keeper.narrow(kinds[0]) for keeper in known]
                plan = return_plan(partition, rank, side.narrow(kinds[0]), places, regions)
                self.bytes_returned += self.store.put_back(plan, [(k, side.arrays[k]) for k in kinds])
                fault_point("scatter", self.steps_done)
            known.append(side)

    def _gradient_memory(self) -> Tensor:
        needed = max(side.arrays[WEIGHTS].numel() for side in self.pair.trained) + TAIL
        if self._reduce_memory.numel() < needed:  # a mask that minimum widths have taken beyond the cap
            self._reduce_memory = self._reduce_memory.new_empty(needed)
        return self._reduce_memory


def overlaps(rounds: RoundConfig, device: torch.device) -> bool:
    """Whether transfers run beside the steps."""
    return rounds.overlaps(device.type == "cuda")
