"""From one round's subnets to the next: what stays on the device, what crosses the bus, and when.

    round r     | steps on C ............................ |
    transfers   | return evicted of B | prefetch for D    |
                                                          | carry C -> D (device to device)
    round r + 1                                           | steps on D ...................
    transfers                                             | return evicted of C | prefetch for E

Two pairs of subnets take turns. Entries are prefetched that the pair in training does not train, so the store
is up to date about them as soon as what the round before has evicted is back, and fetching them while the
steps go on reads nothing stale. What the pair in training does train is carried over after its last step.
With overlap the transfers run on one thread (and one CUDA stream), in the order of the picture; without it,
between the rounds. What ranks train by themselves cannot be carried: it is put back as they agree on it, and
fetched then. Without delta transfer there is one pair, which takes half the memory: all of it is returned,
then all of the next one fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from offload_sparse.channels.selection import Selection
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.losses import TAIL
from offload_sparse.engine.optimizer import SubnetOptimizer
from offload_sparse.engine.subnet_pair import Piece, Side, SubnetPair, Wanted, padding
from offload_sparse.engine.timeline import Timeline
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.copy import copy_blocks, send_tables
from offload_sparse.store.copy.plans import Narrow, TransferPlan, fetch_plan, fetch_plan_per_rank, return_plan
from offload_sparse.store.copy.regions import MOST_HOLDERS, Regions
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, WeightStore

T = TypeVar("T")

Load = tuple[Side, list[str], tuple[Side, ...], TransferPlan]
"""A side to be filled, its arrays that come from the same places, the sides that hold some of their entries
(in the order in which ``TransferPlan.carried`` numbers them), and the moves.
"""


@dataclass
class Transfer:
    """The way to the subnets of the next round.

    Attributes:
        wanted: these subnets.
        source: the pair of the round before; None when nothing on the device can be used.
        target: the pair to fill.
        local: it begins in a round that ranks train by themselves: what that trains comes late, from the
            store.
        loads: how the arrays of the target come about, side a first.
    """

    wanted: Wanted
    source: SubnetPair | None
    target: SubnetPair
    local: bool = False
    loads: list[Load] = field(default_factory=list)


class Transfers:
    """Moves the weights from round to round and keeps the store in step.

    Args:
        store: the full weights.
        model: the full model on the meta device.
        optimizer: that of the weights.
        device: where the subnets compute.
        capacity: most parameters that a subnet has; the buffers are allocated for them, once.
        pairs: of subnets on the device; two leave there what stays.
        overlap: move entries while a round computes; needs two pairs.

    Attributes:
        ahead: the pair in training knows more than the store.
        integer_buffers: buffers that are not sliced, on the device, by name.
        bytes_fetched, bytes_returned: bytes that have left, and come back to, this rank's rows.
        bytes_peak: largest bytes of subnets and gradients so far.
        before_return: called before the store is written to.
        before_settling: called before all that the pair in training knows is written to the store.
        replacing: entered while every value of the store is written anew.
        went_back: set by ``forget``: the store is where the session is, whatever the pair had learned.
        finish_asides: waits for all that ``aside`` was given.
        steps_done: optimizer steps of the run, as far as told.
        timeline: when transfers began and ended.
    """

    def __init__(
        self,
        store: WeightStore,
        model: nn.Module,
        optimizer: SubnetOptimizer,
        device: torch.device,
        capacity: int,
        pairs: int,
        overlap: bool,
    ) -> None:
        self.store = store
        self.optimizer, self.device = optimizer, device
        self.integer_buffers = {name: value.to(device) for name, value in store.integer_buffers.items()}
        capacity += padding(store, WEIGHTS)
        parts = (store, model, optimizer, device, capacity, self.integer_buffers)
        self._pairs = [SubnetPair(*parts) for _ in range(pairs)]
        self._reduce_memory = torch.empty(capacity + TAIL, dtype=store.dtype, device=device)
        self._side_stream = SideStream(device) if overlap else None
        self._compiled = ""
        self.ahead = False
        self._bound_ahead = False  # the pair that is taken next has its modules at its arrays already
        self._prefetched: Future[Transfer] | None = None
        self._returning: Future[None] | None = None
        self._selections: list[Selection] = []  # those asked for last
        self.finish_asides: Callable[[], object] = lambda: None
        self.bytes_fetched = self.bytes_returned = self.bytes_peak = self.steps_done = 0
        self.timeline = Timeline(device)
        self.before_return: Callable[[], object] = lambda: None
        self.before_settling: Callable[[], object] = lambda: None
        self.replacing: Callable[[], AbstractContextManager[object]] = nullcontext
        self.went_back = False

    @property
    def pair(self) -> SubnetPair:
        """The pair in training; the last one, which may be the same, is filled next."""
        return self._pairs[0]

    def compile(self, mode: str | None = None) -> None:
        """Compile the passes of all subnets in a mode of ``torch.compile``; a new width is compiled anew."""
        self._compiled = mode or "default"
        for side in (side for pair in self._pairs for side in pair.sides):
            side.module.compile(dynamic=False, mode=mode)

    @property
    def nbytes(self) -> int:
        """Bytes of the subnets in use and of their gradients."""
        gradients = max((s.arrays[WEIGHTS].numel() for s in self.pair.trained if s.arrays), default=0) + TAIL
        in_use = sum(pair.nbytes for pair in self._pairs if pair.wanted is not None)
        return in_use + gradients * self._reduce_memory.element_size()

    def open(self, wanted: Wanted) -> SubnetPair:
        """The pair of ``wanted``, filled and bound, ready to be trained."""
        if not self.pair.holds(wanted):
            self._exchange(wanted)
        if not self._bound_ahead:
            self.pair.bind(self._gradient_memory(self.pair))
        self._bound_ahead = False
        self.bytes_peak = max(self.bytes_peak, self.nbytes)
        return self.pair

    def stay(self, mask: Tensor, *kinds: str) -> Wanted:
        """The subnet that is trained from now on, with arrays of ``kinds``, too. Its addresses stay, so that
        on a GPU compiled passes are replayed as CUDA graphs."""
        for pair in self._pairs:
            added = (kind for kind in kinds if kind not in pair.trained_kinds)
            pair.trained_kinds = (*pair.trained_kinds[:-1], *added, BUFFERS)
        if self._compiled == "default" and self.device.type == "cuda":
            self.compile("reduce-overhead")
        return Wanted(self.selection(mask))

    def selection(self, mask: Tensor) -> Selection:
        """``mask`` resolved; that of a round that was fetched ahead has been already."""
        found = next((known for known in self._selections if known.mask is mask), None)
        if found is None:
            found = Selection(self.store.channel_map, mask)
            self._selections = [*self._selections, found][-1 - self.store.ranks.world_size :]
        return found

    def aside(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin ``work`` of the host behind the transfers under way and all earlier asides, or do it if
        transfers do not overlap; returns what waits for its result.
        """
        if self._side_stream is None:
            done = work()
            return lambda: done
        before = self.finish_asides

        def in_turn() -> T:
            before()  # it is done; what it has raised is raised again
            return work()

        asked = self._side_stream.submit(in_turn)
        self.finish_asides = lambda: None if asked.cancelled() else asked.result()
        return asked.result

    def prefetch(self, wanted: Callable[[], Wanted], local: bool) -> None:
        """Begin to fetch what the next round needs and the present one does not train.

        Args:
            wanted: the subnets of the next round; asked for on the thread of the transfers.
            local: ranks train the present round by themselves.
        """
        if self._side_stream is not None:
            source, target = self._source, self._pairs[-1]

            def fetch() -> Transfer:
                transfer = Transfer(wanted(), source, target, local)
                self._fetch(transfer)
                target.bind(self._gradient_memory(target))
                return transfer

            self._prefetched = self._side_stream.submit(fetch)

    def stepped(self, steps_done: int, ahead: bool = True) -> None:
        """Note that the pair has been trained since the store last saw it; not ``ahead``: what it has learned
        is this rank's alone, and never returned as it is.
        """
        self.ahead = ahead
        self.steps_done = steps_done

    def put_back(self, pieces: Sequence[Piece]) -> None:
        """Write this rank's entries of ``pieces``; the next pair is filled from the store."""
        self.join()
        self._put_back(pieces, ())
        self.pair.wanted, self.ahead = None, False
        if self._prefetched is not None:
            self._prefetched.result().source = None  # the rest of it is in the store now

    def settle(self) -> None:
        """Bring the store up to date: after this it holds every weight, no transfer is under way, and any
        rank may read and write it. The pair stays as it is.
        """
        self.join()
        if self.ahead:
            self.before_settling()
        if self.ahead:  # it has not led back
            self._put_back(self.pair.trained, ())
            self.ahead = False

    def join(self) -> None:
        """Wait for the transfers under way: what the round before has evicted is back; what has been
        prefetched stays so.
        """
        for pending in (self._returning, self._prefetched):
            if pending is not None:
                assert self._side_stream is not None
                self._side_stream.wait(pending)
        self._returning = None

    def scratch(self) -> Side:
        """A side for other uses than training; the next round starts afresh from the store."""
        self.settle()
        self._prefetched = self.pair.wanted = None
        return self.pair.sides[0]

    def forget(self) -> None:
        """Drop what the pair in training has learned since the store was last settled."""
        self.join()
        self._prefetched = self.pair.wanted = None
        self.ahead, self.went_back = False, True

    def close(self, abandon: bool = False) -> None:
        """Wait for the transfer under way and stop the thread; the next one starts another.

        Args:
            abandon: leave out those that have not begun: a rank may be gone."""
        if self._side_stream is not None:
            self._side_stream.close(abandon)

    # --- from one pair to the next ---

    @property
    def _source(self) -> SubnetPair | None:
        return None if self.pair.wanted is None else self.pair

    def _exchange(self, wanted: Wanted) -> None:
        if len(self._pairs) == 1:  # everything back, then everything anew
            self.settle()
            self.pair.wanted = None
        self.join()
        begun, self._prefetched = self._prefetched, None
        transfer = None if begun is None else begun.result()
        try:
            if transfer is None or transfer.source is not self._source or not transfer.target.holds(wanted):
                transfer = Transfer(wanted, self._source, self._pairs[-1])
                self._fetch(transfer)
            else:
                self._bound_ahead = True
            self._carry(transfer)
            if self.ahead:
                # Until they are back, only the pair that is left knows the last values of what is evicted;
                # what has been carried over is newer than the store still.
                evict = partial(self._put_back, self.pair.trained, self._pairs[-1].trained)
                if self._side_stream is None:
                    evict()
                else:
                    self._returning = self._side_stream.submit(evict)
        except BaseException:
            self._pairs[-1].wanted, self._bound_ahead = None, False  # half filled; whoever asks again has all
            raise
        self._pairs.reverse()

    def _fetch(self, transfer: Transfer) -> None:
        """Select the sides of the target, and fetch what only the store has."""
        device = self._reduce_memory.device
        transfer.target.select(transfer.wanted)
        transfer.loads = list(self._loads(transfer))
        plans = [plan for *_, plan in transfer.loads]
        self.store.send_tables([plan.fetched for plan in plans if plan.fetched is not None], device)
        send_tables([blocks for plan in plans for blocks in plan.carried.values()], device)
        with self.timeline.span("gather"):
            for side, kinds, _, plan in transfer.loads:
                arrays = [(kind, side.arrays[kind]) for kind in kinds]
                self.bytes_fetched += self.store.fetch((plan, arrays))
                fault_point("gather", self.steps_done)

    def _carry(self, transfer: Transfer) -> None:
        """Copy what the source, or an earlier side of the target, holds. The order of the loads matters."""
        late = [
            (plan.late, [(kind, side.arrays[kind]) for kind in kinds])
            for side, kinds, _, plan in transfer.loads
            if plan.late is not None
        ]
        if late:
            with self.timeline.span("gather"):
                self.bytes_fetched += self.store.fetch(*late)
        with self.timeline.span("carry"):
            for side, kinds, holders, plan in transfer.loads:
                for holder, blocks in plan.carried.items():
                    source = holders[holder]
                    copy_blocks(blocks, [(source.arrays[kind], side.arrays[kind]) for kind in kinds])

    def _loads(self, transfer: Transfer) -> Iterator[Load]:
        """How every array of the target comes about.

        Valid entries are held by the sides of the target that come first, by the trained sides of the source,
        and for kinds that the reference has by the reference, whose own entries equal the store's. From a
        local round only the first ones are taken.
        """
        wanted, source, target = transfer.wanted, transfer.source, transfer.target
        stale = source.trained if source is not None and transfer.local else ()
        before = [] if source is None else [*source.trained, *(() if transfer.local else source.active)]
        for side in target.active:
            groups: dict[tuple[bool, tuple[Side, ...]], list[str]] = {}
            for kind in side.arrays:
                holders = tuple(dict.fromkeys(holder for holder in before if kind in holder.arrays))
                groups.setdefault((kind == BUFFERS, holders), []).append(kind)
            known: dict[tuple[Side, ...], Regions] = {}
            for (_, holders), kinds in groups.items():
                if wanted.per_rank:  # every rank must know what the others lack
                    holders = tuple(h for h in holders if h in [pair.sides[0] for pair in self._pairs])
                own = wanted.per_rank if side is target.active[-1] else ()
                if not own and holders not in known:
                    known[holders] = Regions(side.selection, [holder.selection for holder in holders])
                late = [number for number, holder in enumerate(holders) if holder in stale]
                plan = self._plan(side, kinds[0], holders, own, known.get(holders), late)
                if side is not target.sides[0] and kinds[0] in (WEIGHTS, BUFFERS):
                    shared = plan.carried.get(holders.index(target.sides[0]))
                    target.shared |= {} if shared is None else {kinds[0]: shared}
                yield side, kinds, holders, plan
            before.insert(0, side)

    def _plan(
        self,
        side: Side,
        kind: str,
        holders: tuple[Side, ...],
        per_rank: tuple[Selection, ...],
        regions: Regions | None,
        late: Collection[int],
    ) -> TransferPlan:
        partition, rank = self.store.partitions[kind], self.store.ranks.rank
        target, places = side.narrow(kind), [holder.narrow(kind) for holder in holders]
        if not per_rank:
            return fetch_plan(partition, rank, target, places, regions, late)
        targets = [Narrow(selection, target.names, target.step) for selection in per_rank]
        return fetch_plan_per_rank(partition, rank, targets, places, late)

    def _put_back(self, left: Sequence[Piece], keepers: Sequence[Side]) -> None:
        """Write this rank's entries of ``left`` that no side of ``keepers`` trains from now on."""
        self.before_return()
        with self.timeline.span("scatter"):
            self._return(left, keepers)

    def _return(self, left: Sequence[Piece], keepers: Sequence[Side]) -> None:
        known: list[Piece] = list(keepers)
        moves: list[tuple[BlockPlan, list[tuple[str, Tensor]]]] = []
        for side in left:
            regions = Regions(side.selection, [keeper.selection for keeper in known], wanted=[None])
            for kinds in ([k for k in side.arrays if k != BUFFERS], [BUFFERS]):
                partition, rank = self.store.partitions[kinds[0]], self.store.ranks.rank
                plan = return_plan(partition, rank, side.narrow(kinds[0]), regions)
                moves.append((plan, [(k, side.arrays[k]) for k in kinds]))
            # What several hold is equal in all of them, so that it does not matter which of many writes it.
            known = [*known, side][:MOST_HOLDERS]
        self.store.send_tables([plan for plan, _ in moves], self._reduce_memory.device, to_host=True)
        for move in moves:
            self.bytes_returned += self.store.put_back(*move)
            fault_point("scatter", self.steps_done)

    def _gradient_memory(self, pair: SubnetPair) -> Tensor:
        needed = max(side.arrays[WEIGHTS].numel() for side in pair.trained) + TAIL
        if self._reduce_memory.numel() < needed:  # a mask that minimum widths have taken beyond the cap
            self._reduce_memory = self._reduce_memory.new_empty(needed)
        return self._reduce_memory


class SideStream:
    """One background thread whose device work runs on a CUDA stream of its own; on a CPU, just the thread.

    Work runs in order, each piece behind what the caller's stream had been given when it was submitted.

    Args:
        device: where the work computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def _worker(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "transfer", self._begin)
        return self._thread

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` in the background."""
        if self._stream is None:
            return self._worker.submit(work)
        ready = torch.cuda.current_stream(self._stream.device).record_event()
        return self._worker.submit(self._on_stream, ready, work)

    def wait(self, pending: Future[Any]) -> None:
        """Wait for the thread, make the caller's stream wait for the device; raises what the work raised."""
        pending.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def close(self, abandon: bool) -> None:
        """Let the work end and the thread with it; what has not begun is left out if ``abandon``."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=abandon)

    def _begin(self) -> None:
        """A thread begins on device 0, on which the first question for a stream would open a context."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)

    def _on_stream(self, ready: torch.cuda.Event, work: Callable[[], T]) -> T:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return work()
