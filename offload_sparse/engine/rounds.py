"""Algorithm 1 and Appendix D of Zhou et al. (2021): one round, from top to bottom.

A round is K steps on a pair of subnets, and the loss differences that the keep probabilities learn from:

    every_step    step 0: train a, evaluate b   step 1: train a, evaluate b   step 2: train a, evaluate b   …
    turns         step 0: train a, evaluate b   step 1: train b, evaluate a   step 2: train a, evaluate b   …
    round_start   step 0: train a, evaluate b   step 1: train a               step 2: train a               …

``every_step`` with K = 1 is Algorithm 1. With K > 1 it compares a trained subnet with one that has stood
still, so L(a) - L(b) falls below zero whatever the masks are; ``turns`` treats both alike and costs the same.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.engine.averaging import EMA, Averaging
from offload_sparse.engine.config import FinalConfig, OnNonFinite, RoundConfig
from offload_sparse.engine.distributed import assert_equal_on_ranks, average
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.forward import OWN_BACKWARD, Closure, Forward, Metrics, bound, in_parts
from offload_sparse.engine.gradients import FlatGradients, Reducer
from offload_sparse.engine.losses import LOSS_A, MOST_RECORDS, Losses, Measured, StepRecord, share
from offload_sparse.engine.nonfinite import NonFinite
from offload_sparse.engine.optimizer import LossScale
from offload_sparse.engine.probing import losses_of, probed
from offload_sparse.engine.request import Ask, Request, Requests
from offload_sparse.engine.roles import Masks, Roles, reference_of, subnet_of
from offload_sparse.engine.subnet_pair import Piece, Side, SubnetPair, Wanted
from offload_sparse.engine.transfers import Transfers
from offload_sparse.policy.estimators import paired_losses
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks

CHECK_RANKS = "OFFLOAD_SPARSE_CHECK_RANKS"
"""Variable of the environment; 1 compares checksums of s, masks and subnet weights over all ranks in every
round (slow, for debugging)."""

ROUNDS_OF_PAIRS = 10
"""Rounds of pairs of forward passes in the place of one of training: so many new masks in K steps."""


class Rounds(Requests):
    """The training of a network in rounds: the algorithm, and what it needs to know between two steps.

    Args:
        policy: the keep probabilities.
        transfers: the way of the weights.
        cost: what masks cost.
        ranks: all ranks of the run.
        forward: how forward passes are run.
        rounds, final: settings.
        on_nonfinite: what a loss or gradient that is not finite leads to.
        freeze_step: optimizer steps after which the final mask is chosen.
        ema: decay of the moving average of the weights that is kept once it is; 0 keeps none.
        compare_until: steps before this one compare masks by forward passes, and train nothing.
        local_from: steps of training after which, with ``round.sync round``, ranks talk once per round.

    Attributes:
        pair: the subnets of the round that is open, if one is.
        masks: the masks of that round, or of one that was restored in the middle.
        round_step, round_length: steps of that round: made, and in all.
        local: every rank trains the open round by itself.
        restored: by kind, arrays of the subnets of a round that was restored in the middle, those that ranks
            have of their own: BatchNorm statistics, and of a local round all.
        final_mask: bool[C], the mask that training ends with, once it is chosen.
        steps_done, rounds_done, forward_flops: optimizer steps, rounds, and FLOPs per image so far; a
            backward pass counts as two forward passes. ``trained_steps`` are those that did not only compare.
        round_bytes: bytes that have crossed the bus between the last two rounds.
        after_round: called with what a round has learned, before any of it is scattered.
    """

    def __init__(
        self,
        policy: MaskPolicy | WidthSearch,
        transfers: Transfers,
        cost: CostModel,
        ranks: Ranks,
        forward: Forward,
        rounds: RoundConfig,
        final: FinalConfig,
        on_nonfinite: OnNonFinite,
        freeze_step: int,
        ema: float,
        compare_until: int,
        local_from: int,
    ) -> None:
        super().__init__(ranks)
        self.channel_map = transfers.store.channel_map
        self._policy, self.transfers, self.cost = policy, transfers, cost
        self.forward, self.rounds, self.final = forward, rounds, final
        self.on_nonfinite, self._planned_freeze, self.asked_freeze = on_nonfinite, freeze_step, sys.maxsize
        measures = torch.promote_types(transfers.store.dtype, torch.float32)
        self._like = torch.zeros((), dtype=measures, device=transfers.device)
        self.reducer = Reducer(ranks.world_size, self._like)
        self.losses = Losses(ranks.world_size, self._like)
        self.steps_done, self.trained_steps, self.rounds_done, self.forward_flops = 0, 0, 0, 0.0
        self.pair: SubnetPair | None = None
        self.masks: Masks | None = None
        self.round_step = self.round_length = self.round_bytes = self._bytes_before = 0
        self.roles, self.local = Roles(rounds, ranks.world_size, compare_until + local_from), False
        self.averaging = Averaging(transfers.store, ranks, rounds)
        self.restored: list[Mapping[str, Tensor]] = []
        self._next_masks: Callable[[], Masks] | None = None
        self.final_mask: Tensor | None = self.channel_map.full_mask() if policy.trivial else None
        self._mask_flops = 0, 0  # of subnets a and b of the open round
        self.after_round: Callable[[Sequence[Piece]], None] | None = None
        self.check_ranks = os.environ.get(CHECK_RANKS) == "1"
        self.ema, self.ema_steps, self.compare_until = ema, 0, compare_until
        scaler = forward.scaler if forward.scaler is not None and forward.scaler.is_enabled() else None
        self.loss_scale = None if scaler is None else LossScale(scaler, transfers.device)
        self._unproven = True  # that a closure leaves backward to the session
        self.nonfinite = NonFinite(on_nonfinite, ranks.rank)
        self.before: tuple[dict[str, Any], int] = {}, 0  # the policy and ema_steps
        self._pending: deque[StepRecord] = deque(maxlen=MOST_RECORDS)
        # The last batches in parts, by their steps, and which of these steps were left out.
        self._recent: deque[tuple[int, Sequence[Closure]]] = deque(maxlen=final.selection_batches)
        self._left_out: deque[int] = deque(maxlen=final.selection_batches)

    def training(self) -> Generator[Tensor | None, Request, None]:
        """Train round by round: each request is the closures of a step, each answer its loss, averaged over
        ranks (a scalar on the device; nothing waits for it)."""
        transfers = self.transfers
        request: Request | None = None
        loss: Tensor | None = None
        while True:
            request = request or (yield loss)
            if (pair := self.pair) is None:
                if request is Ask.FINISH or self._all_joined(request):
                    request = None
                    continue
                # Sample m1, m2 ~ p(m | s): a function of s, the seed and the round, the same on every rank.
                self._sample()
                # Gather both subnets from the rows of all ranks: only what the device lacks. What the round
                # before has trained and this one does not is scattered into own rows, without any network.
                pair = self._exchange()
                request = None if request is Ask.OPEN else request
            while self.round_step < self.round_length:
                request = request or (yield loss)
                if request is Ask.FINISH:
                    break
                closures = request if not isinstance(request, Ask) else ()
                fault_point("step", self.steps_done)
                with transfers.timeline.stepping():
                    trained, reference = self.roles.at(self.round_step, pair.same)
                    side, gradients = pair.sides[trained], pair.gradients[trained]
                    measured, statistics = Measured(len(closures), self._like), side.arrays[BUFFERS]
                    before = statistics.clone()
                    self.reducer.begin(gradients, len(closures), self.local)
                    for closure in closures:
                        # The reference: a second forward pass, and no backward.
                        if reference is not None:
                            other = self._evaluated(pair.sides[reference], closure)
                            measured.add(LOSS_A + reference, other)
                        # Forward and backward of the subnet that is trained.
                        mean, metrics = self._trained(side, closure, gradients)
                        measured.add_trained(trained, mean, metrics)
                        if not self.only_compares:
                            self._scaled(share(mean, len(closures))).backward()
                        side.take_buffers()
                    # One all-reduce over the ranks: losses ride behind the gradients, alone in a local round.
                    losses, own = self.reducer.finish(measured.values, request is not Ask.JOIN)
                    if request is Ask.JOIN and self._all_joined(request, losses):
                        request = None
                        continue
                    # The optimizer moves the trained subnet, or nothing where a value is not finite.
                    not_finite = self.losses.not_finite(losses)
                    self._move(pair, trained, not_finite.to(torch.float32), len(closures))
                    torch.where(not_finite, before, statistics, out=statistics)
                    # Shared entries: what both subnets keep is one weight with one momentum.
                    if self._shared_entries_are_read(pair):
                        pair.copy_shared(trained)
                    loss = self.losses.add(losses, own, reference is not None, measured.names)
                self._count(side, trained, reference)
                request = None
            # Estimate: s <- project(s - eta * estimate(L(m1) - L(m2))). No mask of this round depends on it.
            if not self._estimate():
                continue
            # Scatter: BatchNorm statistics as the mean over ranks, weights once the next masks are known;
            # of a local round all as the mean, right now.
            self._end_round(pair, self._agreed(pair))
            request = None if request is Ask.FINISH else request

    # --- asking for it ---

    def _open(self) -> SubnetPair:
        """The subnets of the round that is open, or of the next one."""
        if self.pair is None:
            self._ask(Ask.OPEN)
        assert self.pair is not None
        return self.pair

    # --- sample and gather ---

    def _sample(self) -> None:
        """Sample the masks of the round that begins; one that was restored in the middle has them."""
        restored = self.masks is not None
        self.local = self.roles.local(self.steps_done - (self.round_step if restored else 0))
        if not (restored or self.frozen) and self._cycle_ends(self.steps_done):
            self._probe()
        if not (restored or self.frozen) and self.steps_done >= self.freeze_step:
            self._choose_final_mask()
        fault_point("sample", self.steps_done)
        if not restored:
            self.masks, self.round_step, self.live = self._draw(), 0, []
            self.round_length = self._length(self.steps_done)

    def _draw(self) -> Masks:
        """The masks of the round that begins: the final one, those drawn a round ago, or new ones."""
        if self.final_mask is not None:
            return self.final_mask, self.final_mask
        drawn = self.next_masks
        self.next_masks = None
        if drawn is not None and len(drawn) == self.roles.number(self.steps_done):
            return drawn
        return self._drawn(self.rounds_done, self.steps_done)()  # or on another number of ranks

    def _drawn(self, number: int, first_step: int) -> Callable[[], Masks]:
        """The masks of a round, to be waited for."""
        return self.transfers.aside(partial(self.roles.drawn, self._policy, number, first_step))

    @property
    def own_subnets(self) -> bool:
        """Whether every rank has a subnet of its own in the open round."""
        return self.local and not self.frozen and self.roles.own_subnets(self.steps_done)

    def _length(self, first_step: int) -> int:
        length = self.rounds.k
        if self.frozen:
            return length
        if first_step < self.compare_until:  # two masks tell more of s than many batches of the same two
            length = min(max(1, length // ROUNDS_OF_PAIRS), self.compare_until - first_step)
        length = min(length, self.freeze_step - first_step)
        return next((n for n in range(1, length) if self._cycle_ends(first_step + n)), length)

    def _exchange(self) -> SubnetPair:
        """The subnets of the round, in place of those of the round before; begins to fetch the next ones."""
        assert self.masks is not None
        of_a, of_b = self.masks[0], reference_of(self.masks, self.ranks.rank)
        self._mask_flops = self.cost.flops(of_a), self.cost.flops(of_b)
        if self.own_subnets:  # the mean, so that every rank counts the same
            self._mask_flops = sum(map(self.cost.flops, self.masks)) // len(self.masks), 0
        with self.transfers.timeline.exchanging():
            pair = self.transfers.open(self._wanted(self.masks, self.round_length))
        for side, arrays in zip(pair.trained, self.restored, strict=False):
            for kind, values in arrays.items():
                side.narrow(kind).layout.unpack(values, side.arrays[kind])
        if self.restored and self.local and len(pair.trained) == 1:
            pair.copy_shared(0)  # the reference comes from the store, which does not know this round
        self.restored = []
        moved = self.transfers.bytes_fetched + self.transfers.bytes_returned
        self.round_bytes, self._bytes_before = moved - self._bytes_before, moved
        if self.on_nonfinite == "rollback":
            self.before = self.policy.state_dict(), self.ema_steps
        self._look_ahead(self.steps_done - self.round_step + self.round_length)
        if self.check_ranks:
            self._check_ranks(pair)
        self.pair = pair
        return pair

    def _look_ahead(self, next_step: int) -> None:
        """Draw the masks of the next round and begin to fetch them.

        Their s is one round old. None are drawn when the next round begins with the choice of the final mask.
        """
        if not self.rounds.prefetch or self.frozen or next_step >= self.freeze_step:
            return
        if self._cycle_ends(next_step):
            return
        length = self._length(next_step)
        if self._next_masks is None:  # a session that was restored has them
            self._next_masks = self._drawn(self.rounds_done + 1, next_step)
        masks = self._next_masks
        if self.rounds.delta or self.local:
            self.transfers.prefetch(
                lambda: self.roles.wanted(self.transfers, masks(), length, self.own_subnets), self.local
            )

    def _wanted(self, masks: Masks, length: int) -> Wanted:
        """The subnets of ``masks`` on this rank."""
        if not self.frozen:
            return self.roles.wanted(self.transfers, masks, length, self.own_subnets)
        return self.transfers.stay(masks[0], *([EMA] if self.ema else []))

    # --- between the steps of a round ---

    @property
    def only_compares(self) -> bool:
        """The present step trains nothing."""
        return not self.frozen and self.steps_done < self.compare_until

    def _shared_entries_are_read(self, pair: SubnetPair) -> bool:
        """The other side is read again in this round, or was trained too and goes on after it."""
        if pair.same or self.rounds.reference == "round_start":
            return False
        return len(pair.trained) == 2 or self.round_step + 1 < self.round_length

    def _evaluated(self, side: Side, closure: Closure) -> Tensor:
        """The loss of a subnet, without a graph and without a trace."""
        with side.buffers_untouched():
            return self.forward.evaluated(side.module, closure)

    def _trained(self, side: Side, closure: Closure, gradients: FlatGradients) -> tuple[Tensor, Metrics]:
        """The loss of a subnet, with its graph unless nothing is trained.

        Raises:
            ValueError: it has none, or the closure has run backward already.
        """
        if self.only_compares:
            with torch.no_grad(), side.buffers_untouched():
                return self.forward.trained(side.module, closure)
        gradients.hold()
        loss, metrics = self.forward.trained(side.module, closure)
        if not loss.requires_grad:
            raise ValueError(
                "no gradient reaches the network: the loss that the closure returns does not depend on a "
                "parameter with requires_grad; return the loss itself, neither detached nor as a number"
            )
        if self._unproven:
            self._unproven = False
            if not gradients.empty:
                raise ValueError(OWN_BACKWARD)
        return loss, metrics

    def _move(self, pair: SubnetPair, trained: int, not_finite: Tensor, batches: int) -> None:
        """Step one side, if this rank has had a batch; else it takes over later what others have made."""
        if self.loss_scale is not None:
            pair.gradients[trained].flat.div_(self.loss_scale.scale)
            self.loss_scale.update(not_finite)
        if batches and not self.only_compares:
            pair.optimizer_step(trained, not_finite, self.trained_steps)
        if batches:
            alone = self.local or self.ranks.world_size == 1
            self.live.append(0 if alone else hash(tuple(self.transfers.optimizer.settings().values())))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def _count(self, side: Side, trained: int, reference: int | None) -> None:
        """One more step of the run is done."""
        if self.ema and self.frozen:
            average = side.arrays[EMA]
            average.lerp_(side.arrays[WEIGHTS], 1 - self.ema if self.ema_steps else 1.0)
            self.ema_steps += 1
        self.trained_steps += not self.only_compares
        self.forward_flops += (1 if self.only_compares else 3) * self._mask_flops[trained]
        if reference is not None:
            self.forward_flops += self._mask_flops[reference]
        self.round_step += 1
        self.steps_done += 1
        self.transfers.stepped(self.steps_done, ahead=not self.local)

    # --- estimate ---

    def catch_up(self) -> None:
        """Learn from the steps made so far. Waits for the device; every rank calls it at the same step."""
        compared = []
        own = self.own_subnets
        per_rank = own or (self.rounds.subnets == "references" and not self.frozen)
        entries = self.losses.read(self.steps_done, per_rank, self.loss_scale is not None, own)
        for step, entry in enumerate(entries, self.steps_done - len(entries)):
            self.nonfinite.seen(entry.fault)
            self._left_out += [step] if entry.fault else []
            if entry.compared is not None and not self.frozen:
                compared.append(entry)
            self._pending.append(entry if entry.losses is None else dataclasses.replace(entry, losses=None))
        if compared:
            self._learn(compared)
        if self.nonfinite.rolls_back(self.steps_done):
            self.transfers.forget()
            state, self.ema_steps = self.before
            self.policy.load_state_dict(state)
            self._drop_round()
            self.next_masks = None
            self.rounds_done += 1  # new masks: those that led here are not drawn again

    def _learn(self, entries: Sequence[StepRecord]) -> None:
        """A step on s from the losses of each of these optimizer steps."""
        assert self.masks is not None
        policy = self._policy
        assert isinstance(policy, MaskPolicy), "one mask at a time has nothing to compare"
        seen = [entry.losses for entry in entries if entry.losses is not None]
        if not seen:
            first, second = zip(*(entry.compared for entry in entries if entry.compared), strict=True)
            m1, m2 = self.masks[:2]
            self.transfers.aside(partial(policy.update, first, second, m1, m2, self.rounds_done))
            return
        own, references = self.own_subnets, range(self.ranks.world_size)
        losses = torch.stack([of_ranks[0] if own else paired_losses(*of_ranks) for of_ranks in seen])
        masks = self.masks if own else (self.masks[0], *(reference_of(self.masks, r) for r in references))
        apart = own and self.rounds.subnets == "partition"
        learn = partial(policy.update_from_ranks, losses, torch.stack(masks), self.rounds_done, apart)
        self.transfers.aside(learn)

    def _estimate(self) -> bool:
        """Learn from the round that ends; False if it is rolled back instead."""
        with self.transfers.timeline.stepping():
            self.catch_up()
        self.transfers.timeline.end_round()
        if self.pair is not None:
            fault_point("estimate", self.steps_done)
        return self.pair is not None

    def _drop_round(self) -> None:
        """No round is open any more; the next request begins one."""
        self.pair, self.masks, self.restored, self._training = None, None, [], None

    # --- the end of a round, and of the search ---

    def _agreed(self, pair: SubnetPair) -> Sequence[Piece]:
        """What all ranks know of the round that ends: their mean."""
        self._take_over()
        if not self.local:
            for side in pair.trained:
                average(side.arrays[BUFFERS], self.ranks.world_size)
            return pair.trained
        assert self.masks is not None
        own, ranks = self.own_subnets, range(self.ranks.world_size)
        subnets = [self.transfers.selection(subnet_of(self.masks, rank)) for rank in ranks if own]
        with self.transfers.timeline.exchanging(), self.transfers.timeline.span("scatter"):
            return self.averaging.agreed(pair.trained, subnets, len(self.live))

    def _end_round(self, pair: SubnetPair, agreed: Sequence[Piece]) -> None:
        if self.check_ranks:
            self._check_ranks(pair)
        self.pair, self.masks = None, None
        self.rounds_done += 1
        if self.after_round is not None:
            self.after_round(agreed)
        if self.rounds.sync == "round":
            with self.transfers.timeline.exchanging():
                self.transfers.put_back(agreed)
        if self.on_nonfinite == "rollback":
            self.transfers.settle()

    @property
    def policy(self) -> MaskPolicy | WidthSearch:
        """The keep probabilities, with all that has been asked of them."""
        self.transfers.finish_asides()
        return self._policy

    @property
    def next_masks(self) -> Masks | None:
        """The masks of the round after the open one, drawn ahead."""
        return None if self._next_masks is None else self._next_masks()

    @next_masks.setter
    def next_masks(self, masks: Masks | None) -> None:
        self._next_masks = None if masks is None else lambda: masks

    @property
    def freeze_step(self) -> int:
        """Optimizer steps after which the final mask is, or was, chosen: as planned or as asked for."""
        return min(self._planned_freeze, self.asked_freeze)

    @property
    def frozen(self) -> bool:
        """The final mask is chosen; s no longer moves."""
        return self.final_mask is not None

    def _choose_final_mask(self) -> None:
        """Draw masks from p(m|s), keep the best by training loss (Zhou et al. 2021, final sampling)."""
        assert self.pair is None, "the subnets are in use"
        candidates = self.policy.candidates(self.final.candidates, self.rounds_done)
        compared = candidates if len(candidates) > 1 else []
        self.forward_flops += len(self._recent) * sum(map(self.cost.flops, compared))
        among = self.recent, self.transfers, self.forward, self.ranks
        losses = losses_of(compared, *among) if compared else torch.zeros(1)
        self.final_mask = candidates[int(losses.nan_to_num(nan=torch.inf).argmin())]
        self.asked_freeze = min(self.freeze_step, self.steps_done)  # whatever length the run is given later
        self.next_masks = None

    def span(self, step: int, steps: int) -> tuple[int, int]:
        """The cycle of a search that ``step`` lies in; of any other run the steps that train."""
        if isinstance(self._policy, WidthSearch):
            return self._policy.cycle(step, steps, self.freeze_step if self.frozen else None)
        return self.steps_done - self.trained_steps, steps

    def _cycle_ends(self, step: int) -> bool:
        """Whether the widths of a search by probes move before ``step``."""
        return isinstance(self._policy, WidthSearch) and step in self._policy.boundaries

    def _probe(self) -> None:
        """Compare the present widths with thinner ones in pairs of forward passes, and move them."""
        search = self.policy
        assert isinstance(search, WidthSearch)
        found, importance = probed(search, self.recent, self.transfers, self.forward, self.ranks)
        self.forward_flops += 2 * found.count / self.ranks.world_size * self.cost.flops(search.mask)
        search.move(found, importance)
        self.next_masks = None

    def _check_ranks(self, pair: SubnetPair) -> None:
        assert self.masks is not None
        sides = pair.trained if self.rounds.subnets == "references" else pair.active
        named = {"keep probabilities": [self.policy.s], "masks": list(self.masks)}
        if not self.local or (self.round_step == 0 and not self.own_subnets):
            named["subnet weights"] = [side.arrays[WEIGHTS] for side in sides]
        assert_equal_on_ranks(named, self.ranks.world_size, self.ranks.host_group)

    # --- going on with a state ---

    def reopen(
        self,
        masks: Masks | None,
        step: int,
        length: int,
        live_steps: int,
        restored: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Go on with the store as it is, in the middle of a round or (without masks) between two; a round
        that is open is dropped.

        Args:
            masks: of the round.
            step, length: steps of the round: made, and in all.
            live_steps: those of them that this rank had a batch for.
            restored: by kind, arrays of the subnets that it trains, on this rank.
        """
        self.transfers.forget()
        self.transfers.steps_done = self.steps_done
        self._drop_round()
        self.masks, self.round_step, self.round_length = masks, step, length
        self.live, self.restored = [0] * live_steps, list(restored)
        self.local = masks is not None and self.roles.local(self.steps_done - step)
        self.losses.clear()
        self._pending.clear()
        self._recent.clear()
        self._left_out.clear()

    @property
    def recent(self) -> list[Closure]:
        """The last ones that were trained on: of all steps but those that were not finite."""
        return [closure for step, parts in self._recent if step not in self._left_out for closure in parts]

    def remember(self, closures: Iterable[Closure | Sequence[Closure]]) -> None:
        """Take ``closures``, each as ``step`` takes it, for the last ones that were trained on: the final
        mask is chosen on them."""
        self._recent.extend((-1, [bound(part) for part in in_parts(closure)]) for closure in closures)
