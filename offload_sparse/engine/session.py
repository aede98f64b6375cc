"""``SparseOffload``: what a training loop holds.

session = SparseOffload(model, (images,), optimizer=OptimConfig(lr=0.1), rho=0.25, total_steps=steps)
for batch in loader:
    loss = session.step(batch, loss_fn)   # sample, gather, K steps, estimate, scatter happen inside
network = session.finalize().module       # an ordinary narrow nn.Module
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import Residual
from offload_sparse.channels.selection import Selection
from offload_sparse.engine.batch_norm import Run, reestimate_batch_norm
from offload_sparse.engine.config import (
    FinalConfig,
    OnNonFinite,
    OptimConfig,
    RoundConfig,
    check_combination,
)
from offload_sparse.engine.distributed import assert_equal_on_ranks, average, averaged
from offload_sparse.engine.draw import Draw, OpenRound, pair_on, resolve, sample
from offload_sparse.engine.faults import fault_point
from offload_sparse.engine.finalize import extract, losses_of
from offload_sparse.engine.learning import learn, mean_cost
from offload_sparse.engine.optimizer import slot_names
from offload_sparse.engine.preparation import ModelSource, prepare
from offload_sparse.engine.reduction import Averager
from offload_sparse.engine.rounds import Forward, LossFunction, Round, StepRecord, roles
from offload_sparse.engine.subnet_pair import Side
from offload_sparse.engine.transfers import Masks, Relay, overlaps
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.host_memory import pin_mode
from offload_sparse.store.tiers import Identity, Mode, open_tier
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore

logger = logging.getLogger(__name__)

_CONSEQUENCES = {
    "skip": "the batch has been skipped",
    "rollback": "the run goes on from the end of the round before",
}


class SparseOffload:
    """Trains a network whose full weights live in host memory through sampled channel subnetworks.

    Args:
        model: a function that builds the network (its initialisation is then replayed shard by shard, and no
            rank holds the whole network), or a network whose present weights are the start.
        example_inputs: tensors that the network can be called with; only shapes and dtypes matter.
        total_steps: optimizer steps of the run; ``rounds.freeze_at`` is a share of it. Without it the final
            mask is chosen by ``freeze`` or, untrained, by ``finalize``.
        rho: remaining ratio; shorthand for the one of ``policy``.
        policy, rounds, optimizer, final, store: see ``offload_sparse.config.run``.
        residual: residual policy of the discovery.
        channel_map: a map made by hand, instead of the discovery.
        block: channels per atom; budgets, caps and minimum widths count atoms.
        seed: seed of the initial weights and of the masks.
        device: where subnets compute; the CUDA device when there is one.
        dtype: type of weights, slots and gradients.
        forward: autocast and BatchNorm mode of forward passes.
        on_nonfinite: what a step whose loss or gradient is not finite leads to, beside moving nothing itself:
            ``stop`` raises, ``skip`` goes on with the next batch, ``rollback`` goes on from the end of the
            round before (which costs the bus a full subnet per round).
        verify: check slice = mask on the model before anything trains.
        compile: compile the forward passes of the subnets; ``policy.sampler auto`` then keeps widths fixed.
        run_id: what a store in files is known by.
        store_mode: ``new`` initialises the weights; ``resume`` opens the files of an interrupted run instead;
            ``replace`` initialises whatever files of this run there are.

    Raises:
        ValueError: the model cannot be narrowed, or an argument is out of range; says what to change.
    """

    def __init__(
        self,
        model: ModelSource,
        example_inputs: Draw,
        *,
        total_steps: int | None = None,
        rho: float | None = None,
        policy: PolicyConfig | None = None,
        rounds: RoundConfig | None = None,
        optimizer: OptimConfig | None = None,
        final: FinalConfig | None = None,
        store: StoreConfig | None = None,
        residual: Residual = "coupled",
        channel_map: ChannelMap | None = None,
        block: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        forward: Forward | None = None,
        on_nonfinite: OnNonFinite = "stop",
        verify: bool = True,
        compile: bool = False,
        run_id: str = "",
        store_mode: Mode = "new",
    ) -> None:
        self.rounds = rounds or RoundConfig()
        self.optim = optimizer or OptimConfig()
        self.final = final or FinalConfig()
        self.forward = forward or Forward()
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_nonfinite = on_nonfinite
        self.ranks = Ranks.current()
        storage = store or StoreConfig()
        shard = Ranks.current(per_node=True) if storage.shard == "node" else self.ranks
        prepared = prepare(model, example_inputs, residual, self.ranks, channel_map, verify, block)
        self.meta_model, self.channel_map = prepared.meta_model, prepared.channel_map
        self._example_inputs = example_inputs
        self._factory = partial(copy.deepcopy, self.meta_model) if isinstance(model, nn.Module) else model
        pin = pin_mode(storage.pin, self.device)
        slots = slot_names(self.optim)
        identity = Identity.of(run_id, self.channel_map, dtype, self.ranks.world_size, self.ranks.rank)
        self.tier = open_tier(storage.tier, Path(storage.path or "store"), identity, dtype, pin, store_mode)
        self.store = WeightStore(self.channel_map, *prepared.tensor_names(), slots, dtype, shard, self.tier)
        if self.tier.filled:
            self.store.integer_buffers = self.tier.integers()
        else:
            prepared.fill(self.store, seed)
            self.tier.complete(self.store.integer_buffers)
        self.cost = CostModel(self.meta_model, self.channel_map, example_inputs)
        probabilities = policy or PolicyConfig()
        if rho is not None:
            probabilities = dataclasses.replace(probabilities, rho=rho)
        chosen = probabilities.resolved(compile)
        check_combination(chosen, self.rounds)
        self.policy = MaskPolicy(chosen, self.channel_map.groups, seed, self.cost)
        self.relay = Relay(
            self.store,
            self.meta_model,
            self.optim,
            self.device,
            self.policy.size_cap,
            delta=self.rounds.delta and not self.policy.trivial,
            overlap=not self.policy.trivial and overlaps(self.rounds, self.device),
        )
        if compile:
            self.relay.compile()
        self.averager = Averager("auto", self.ranks.world_size, self.device)
        self.freeze_step = sys.maxsize if total_steps is None else round(self.rounds.freeze_at * total_steps)
        self.steps_done = 0
        self.rounds_done = 0
        self.forward_flops = 0.0
        self.final_mask: Tensor | None = self.channel_map.full_mask() if self.policy.trivial else None
        self._round: Round | None = None
        self._masks: Draw | None = None  # of a, and of b on every rank (one for all if shared)
        self._mask_flops: tuple[int, int] = (0, 0)  # of the open round, per side
        self.next_masks: Draw | None = None  # drawn ahead
        self._reopened: OpenRound | None = None
        self._s_before = self.policy.state_dict()
        self._pending: list[StepRecord] = []
        self.round_bytes = 0  # that have crossed the bus between the last two rounds
        self._bytes_before = 0
        self.after_round: Callable[[tuple[Side, ...]], None] | None = None
        self._references = 1 if self.rounds.references == "shared" else self.ranks.world_size
        self._recent: deque[tuple[Any, LossFunction]] = deque(maxlen=self.final.selection_batches)

    # --- the loop ---

    def step(self, batch: Any, loss_fn: LossFunction, lr: float | None = None) -> Tensor:
        """One optimizer step; begins and ends rounds as needed.

        Args:
            batch: this rank's part of the batch, passed on to ``loss_fn``.
            loss_fn: (module, batch) -> mean loss, or (mean loss, {name: scalar}).
            lr: learning rate of this step; the configured one if None.

        Returns:
            the loss averaged over ranks, a scalar on the device.

        Raises:
            FloatingPointError: a loss or gradient was not finite, with ``on_nonfinite`` ``stop``. It is
                noticed when records are read or the round ends; the step itself has moved nothing.
        """
        self._recent.append((batch, loss_fn))
        current = self._round or self._start_round()
        self._count_flops(current)
        fault_point("step", self.steps_done)
        with self.relay.timeline.stepping():
            loss = current.step(batch, loss_fn, self.optim.lr if lr is None else lr)
        self.steps_done += 1
        self.relay.stepped(self.steps_done)
        if current.steps == current.length:
            self._finish_round(current)
        return loss

    def freeze(self) -> None:
        """Choose the final mask when the present round ends, and train it from then on."""
        self.freeze_step = min(self.freeze_step, self.steps_done)

    def records(self) -> list[StepRecord]:
        """What the steps since the last call measured. Waits for the device."""
        self.catch_up()
        records, self._pending = self._pending, []
        return records

    def catch_up(self) -> None:
        """Learn from the steps made so far. Waits for the device; every rank calls it at the same step."""
        if self._round is not None:
            self._learn(self._round)

    def losses_of(self, masks: Sequence[Tensor], batches: Sequence[tuple[Any, LossFunction]]) -> Tensor:
        """float64[masks]: mean training loss of the subnet of each. Between rounds; every rank calls it."""
        assert self._round is None, "the subnets are in use"
        return losses_of(self.relay.scratch(), self.channel_map, masks, batches, self.forward, self.ranks)

    def settle(self) -> None:
        """Bring the store up to date; until then the subnets in training may hold newer weights."""
        self.relay.settle()

    @property
    def frozen(self) -> bool:
        """The final mask is chosen; s no longer moves."""
        return self.final_mask is not None

    def expected_cost(self, rounds: int = 8) -> tuple[float, float]:
        """Mean parameters and FLOPs of the subnets of the next ``rounds`` rounds as s is now, or of the final
        mask once it is chosen: shares of the full network.
        """
        masks = [self.final_mask] if self.final_mask is not None else []
        for ahead in range(0 if masks else rounds):
            masks += self.policy.sample(self.rounds_done + ahead)
        return mean_cost(masks, self.cost)

    @contextmanager
    def evaluation(self, batches: Iterable[Any]) -> Iterator[nn.Module]:
        """The subnet now in training, inside with BatchNorm statistics of ``batches``."""
        if self._round is None:
            self._start_round()
        side = self.relay.pair.sides[0]
        kept = side.arrays[BUFFERS].clone()
        try:
            # Other batch sizes and modes than those of training are not worth compiling for.
            with torch.compiler.set_stance("force_eager"):
                self._reestimate(side.module, batches)
                yield side.module
        finally:
            side.arrays[BUFFERS].copy_(kept)
            self.forward.train_mode(side.module)

    def finalize(self, batches: Iterable[Any] | None = None) -> FinalNetwork:
        """End the training: choose the mask if that has not happened, re-estimate BatchNorm, take the network
        out.

        Args:
            batches: training batches for the statistics, in the form that the module takes as input; the last
                ``final.selection_batches`` of the training if None.

        Returns:
            the narrow network, an ordinary ``nn.Module`` with its own memory, and its mask.
        """
        if self._round is not None:
            self._finish_round(self._round)
        if self.final_mask is None:
            self._choose_final_mask()
        assert self.final_mask is not None
        side = self.relay.scratch()
        side.load(Selection(self.channel_map, self.final_mask), (WEIGHTS, BUFFERS))
        side.bind(None)
        module = extract(self.meta_model, side)
        self.relay.close()
        if batches is None:
            self._reestimate(module, self._recent, lambda network, recent: recent[1](network, recent[0]))
        else:
            self._reestimate(module, batches)
        return FinalNetwork(module, self.final_mask, self.channel_map, self._factory, self._example_inputs)

    # --- what a state is made of ---

    @property
    def open_round(self) -> OpenRound | None:
        """The round that is open; one that an evaluation has begun has no step behind it."""
        if self._reopened is not None:
            return self._reopened
        if self._round is None:
            return None
        assert self._masks is not None
        statistics = [side.arrays[BUFFERS] for side in self._round.pair.trained]
        return OpenRound(self._masks, self._round.steps, self._round.length, statistics)

    def reopen(
        self,
        opened: OpenRound | None,
        next_masks: Draw | None,
        final_mask: Tensor | None,
    ) -> None:
        """Carry on with the next step from these masks and the store as it is; the open round is dropped.

        Args:
            opened: the round to carry on with; None starts a new one.
            next_masks: masks that have been drawn for the round after it.
            final_mask: the mask that has been chosen, if any.
        """
        self.relay.forget()
        self.relay.steps_done = self.steps_done
        self._round, self._reopened = None, opened
        self.next_masks, self.final_mask = next_masks, final_mask
        self._pending.clear()
        self._recent.clear()

    def remember(self, batches: Iterable[Any], loss_fn: LossFunction) -> None:
        """Take ``batches`` for the last ones that were trained on."""
        self._recent.extend((batch, loss_fn) for batch in batches)

    # --- one round ---

    def _start_round(self) -> Round:
        if not self.frozen and self.steps_done >= self.freeze_step and self._reopened is None:
            self._choose_final_mask()
        fault_point("sample", self.steps_done)
        reopened, self._reopened = self._reopened, None
        steps = 0 if reopened is None else reopened.steps
        first = self.steps_done - steps
        self._masks = self._draw() if reopened is None else reopened.masks
        of_a, of_b = pair_on(self._masks, self.ranks.rank)
        self._mask_flops = self.cost.flops(of_a), self.cost.flops(of_b)
        length = self._length(self.steps_done) if reopened is None else reopened.length
        with self.relay.timeline.exchanging():
            pair = self.relay.open(self._resolved(self._masks, length))
        if reopened is not None:
            for side, statistics in zip(pair.trained, reopened.statistics, strict=False):
                side.arrays[BUFFERS].copy_(statistics)
        self._round = Round(pair, self.rounds.reference, length, self.forward, self.averager, first, steps)
        moved = self.relay.bytes_fetched + self.relay.bytes_returned
        self.round_bytes, self._bytes_before = moved - self._bytes_before, moved
        self._s_before = self.policy.state_dict()
        self._look_ahead(first + length)
        if self.rounds.check_ranks:
            self._check_ranks()
        return self._round

    def _draw(self) -> Draw:
        """The masks of the round that begins: the final one, those drawn a round ago, or new ones."""
        if self.final_mask is not None:
            return self.final_mask, self.final_mask
        drawn, self.next_masks = self.next_masks, None
        return drawn or sample(self.policy, self.rounds_done, self._references)

    def _look_ahead(self, next_step: int) -> None:
        """Draw the masks of the next round and begin to fetch them.

        Their s is one round old. None are drawn when the next round begins with the choice of the final mask.
        """
        if not self.rounds.prefetch or self.frozen or next_step >= self.freeze_step:
            return
        if self.next_masks is None:  # a session that carries on has them
            self.next_masks = sample(self.policy, self.rounds_done + 1, self._references)
        self.relay.prepare(self._resolved(self.next_masks, self._length(next_step)))

    def _length(self, first_step: int) -> int:
        stop = first_step + self.rounds.k
        return (stop if self.frozen else min(stop, self.freeze_step)) - first_step

    def _resolved(self, masks: Draw, length: int) -> Masks:
        if self.frozen:
            return Masks(Selection(self.channel_map, masks[0]))
        ranks = self.store.ranks
        train_second = self.rounds.reference == "turns" and length > 1
        return resolve(masks, self.channel_map, ranks, self.rounds.references, train_second)

    def _finish_round(self, current: Round) -> None:
        with self.relay.timeline.stepping():
            self._learn(current)
        self.relay.timeline.end_round()
        if self._round is None:
            return  # rolled back
        fault_point("estimate", self.steps_done)
        for side in current.pair.trained:
            average(side.arrays[BUFFERS], self.ranks.world_size)
        if self.rounds.check_ranks:
            self._check_ranks()
        self._round = None
        self.rounds_done += 1
        if self.after_round is not None:
            self.after_round(current.pair.trained)
        if self.on_nonfinite == "rollback":
            self.relay.settle()

    def _learn(self, current: Round) -> None:
        """Read the losses since the last time and move s, on which no mask depends within a round."""
        assert self._masks is not None
        faults = []
        per_rank = self.rounds.references == "per_rank"
        for entry in current.flush(per_rank and not self.frozen):
            if entry.fault:
                faults.append(entry.fault)
            if entry.compared is not None and not self.frozen:
                learn(self.policy, entry, self._masks, self.rounds_done, self.ranks.world_size)
            self._pending.append(dataclasses.replace(entry, losses=None))
        if faults:
            self._handle(faults)

    def _handle(self, faults: list[str]) -> None:
        if self.on_nonfinite == "stop":
            raise FloatingPointError(faults[0])
        if self.ranks.rank == 0:
            for fault in faults:
                logger.warning("%s; %s", fault, _CONSEQUENCES[self.on_nonfinite])
        if self.on_nonfinite == "rollback":
            self.relay.forget()
            self.policy.load_state_dict(self._s_before)
            self._round, self.next_masks = None, None
            self.rounds_done += 1  # new masks: those that led here are not drawn again

    def _choose_final_mask(self) -> None:
        """Draw masks from p(m|s), keep the best by training loss (Zhou et al. 2021, final sampling)."""
        candidates = self.policy.candidates(self.final.candidates, self.rounds_done)
        recent = list(self._recent)
        self.forward_flops += len(recent) * sum(self.cost.flops(mask) for mask in candidates)
        losses = self.losses_of(candidates, recent) if len(candidates) > 1 else torch.zeros(1)
        self.final_mask = candidates[int(losses.nan_to_num(nan=torch.inf).argmin())]
        self.policy.freeze()
        self.next_masks = None

    def _count_flops(self, current: Round) -> None:
        trained, evaluated = roles(self.rounds.reference, current.steps, current.pair.same)
        self.forward_flops += 3 * self._mask_flops[trained]
        if evaluated is not None:
            self.forward_flops += self._mask_flops[evaluated]

    def _reestimate(self, module: nn.Module, batches: Iterable[Any], run: Run = nn.Module.__call__) -> None:
        if not self.forward.frozen_batch_norm:
            reestimate_batch_norm(module, batches, partial(averaged, world_size=self.ranks.world_size), run)

    def _check_ranks(self) -> None:
        assert self._masks is not None
        pair, shared = self.relay.pair, self.rounds.references == "shared"
        named = {"keep probabilities": [self.policy.s], "masks": list(self._masks)}
        named["subnet weights"] = [side.arrays[WEIGHTS] for side in (pair.active if shared else pair.trained)]
        assert_equal_on_ranks(named, self.ranks.world_size, self.device)
