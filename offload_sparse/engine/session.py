"""``SparseOffload``: what a training loop holds.

session = SparseOffload(model, (images,), policy=PolicyConfig(rho=0.25), total_steps=steps)
for batch in loader:
    session.step(batch, loss_fn)      # sample, gather, K steps, estimate, scatter happen inside
network = session.finalize(batches)   # an ordinary narrow nn.Module
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.config import FinalConfig, OptimConfig, PolicyConfig, Residual, RoundConfig
from offload_sparse.engine.batch_norm import reestimate_batch_norm
from offload_sparse.engine.finalize import FinalNetwork, best_candidate, extract
from offload_sparse.engine.optimizer import slot_names
from offload_sparse.engine.pair import SubnetPair
from offload_sparse.engine.preparation import ModelSource, prepare
from offload_sparse.engine.rounds import Forward, LossFunction, Round, StepRecord, roles
from offload_sparse.engine.sync import assert_equal_on_ranks, average
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store.pinned import return_freed_memory
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore
from offload_sparse.structure.accounting import CostModel
from offload_sparse.structure.channel_map import ChannelMap
from offload_sparse.structure.selection import Selection


class SparseOffload:
    """Trains a network whose full weights live in host memory through sampled channel subnetworks.

    Args:
        model: a function that builds the network (its initialisation is then replayed shard by shard, and no
            rank holds the whole network), or a network whose present weights are the start.
        example_inputs: tensors that the network can be called with; only shapes and dtypes matter.
        total_steps: optimizer steps of the run; ``rounds.freeze_at`` is a share of it.
        policy, rounds, optimizer, final: see ``offload_sparse.config``.
        residual: residual policy of the discovery.
        channel_map: a map made by hand, instead of the discovery.
        block: channels per atom; budgets, caps and minimum widths count atoms.
        seed: seed of the initial weights and of the masks.
        device: where subnets compute; the CUDA device when there is one.
        dtype: type of weights, slots and gradients.
        forward: autocast and BatchNorm mode of forward passes.
        verify: check slice = mask on the model before anything trains.

    Raises:
        ValueError: the model cannot be narrowed, or an argument is out of range; says what to change.
    """

    def __init__(
        self,
        model: ModelSource,
        example_inputs: tuple[Tensor, ...],
        *,
        total_steps: int,
        policy: PolicyConfig | None = None,
        rounds: RoundConfig | None = None,
        optimizer: OptimConfig | None = None,
        final: FinalConfig | None = None,
        residual: Residual = "coupled",
        channel_map: ChannelMap | None = None,
        block: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        forward: Forward | None = None,
        verify: bool = True,
    ) -> None:
        self.rounds = rounds or RoundConfig()
        self.optim = optimizer or OptimConfig()
        self.final = final or FinalConfig()
        self.forward = forward or Forward()
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = Ranks.current()
        prepared = prepare(model, example_inputs, residual, self.ranks, channel_map, verify, block)
        self.meta_model, self.channel_map = prepared.meta_model, prepared.channel_map
        pin = self.device.type == "cuda"
        slots = slot_names(self.optim)
        self.store = WeightStore(self.channel_map, *prepared.tensor_names(), slots, dtype, self.ranks, pin)
        prepared.fill(self.store, seed)
        return_freed_memory()
        self.cost = CostModel(self.meta_model, self.channel_map, example_inputs)
        self.policy = MaskPolicy(policy or PolicyConfig(), self.channel_map.groups, seed)
        self.pair = SubnetPair(self.store, self.meta_model, self.optim, self.device)
        self.freeze_step = round(self.rounds.freeze_at * total_steps)
        self.steps_done = 0
        self.rounds_done = 0
        self.forward_flops = 0.0
        self.final_mask: Tensor | None = self.channel_map.full_mask() if self.policy.trivial else None
        self._round: Round | None = None
        self._masks: tuple[Tensor, Tensor] | None = None
        self._pending: list[StepRecord] = []
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
            FloatingPointError: a loss or gradient was not finite; the store still holds the last good round.
        """
        if self.final_mask is None:
            self._recent.append((batch, loss_fn))
        current = self._round or self._start_round()
        self._count_flops(current)
        loss = current.step(batch, loss_fn, self.optim.lr if lr is None else lr)
        self.steps_done += 1
        if current.steps == current.length:
            self._finish_round(current)
        return loss

    def records(self) -> list[StepRecord]:
        """What the steps since the last call measured. Waits for the device."""
        if self._round is not None:
            self._learn(self._round)
        records, self._pending = self._pending, []
        return records

    @property
    def frozen(self) -> bool:
        """The final mask is chosen; s no longer moves."""
        return self.final_mask is not None

    def expected_cost(self, rounds: int = 8) -> tuple[float, float]:
        """Parameters and FLOPs of the subnets to come, as shares of the full network.

        The mean over the masks of the next ``rounds`` rounds under the present s; that of the final mask once
        it is chosen.
        """
        masks = [self.final_mask] if self.final_mask is not None else []
        for ahead in range(0 if masks else rounds):
            masks += self.policy.sample(self.rounds_done + ahead)
        parameters = sum(self.cost.parameters(mask) for mask in masks) / len(masks)
        flops = sum(self.cost.flops(mask) for mask in masks) / len(masks)
        return parameters / self.cost.dense_parameters, flops / self.cost.dense_flops

    @contextmanager
    def evaluation(self, batches: Iterable[Any]) -> Iterator[nn.Module]:
        """The subnet now in training, with BatchNorm statistics re-estimated on ``batches``; undone at the
        end.
        """
        if self._round is None:
            self._start_round()
        side = self.pair.sides[0]
        kept = side.arrays[BUFFERS].clone()
        try:
            self._reestimate(side.module, batches)
            yield side.module
        finally:
            side.arrays[BUFFERS].copy_(kept)
            self.forward.train_mode(side.module)

    def finalize(self, batches: Iterable[Any]) -> FinalNetwork:
        """End the training: choose the mask if that has not happened, re-estimate BatchNorm, take the network
        out.

        Args:
            batches: training batches for the statistics, in the form that the module takes as input.

        Returns:
            the narrow network, an ordinary ``nn.Module`` with its own memory, and its mask.
        """
        if self._round is not None:
            self._finish_round(self._round)
        if self.final_mask is None:
            self._choose_final_mask()
        assert self.final_mask is not None
        selection = Selection(self.channel_map, self.final_mask)
        self.pair.load(selection, None, False, self.steps_done)
        module = extract(self.meta_model, self.pair.sides[0])
        self.pair.discard()
        self._reestimate(module, batches)
        return FinalNetwork(module, self.final_mask, self.channel_map)

    # --- one round ---

    def _start_round(self) -> Round:
        if not self.frozen and self.steps_done >= self.freeze_step:
            self._choose_final_mask()
        stop = self.steps_done + self.rounds.k
        if self.frozen:
            first = second = self.final_mask
        else:
            first, second = self.policy.sample(self.rounds_done)
            stop = min(stop, self.freeze_step)
        assert first is not None
        assert second is not None
        self._masks = (first, second)
        reference = None if self.frozen else Selection(self.channel_map, second)
        length = stop - self.steps_done
        train_second = self.rounds.reference == "turns" and length > 1
        self.pair.load(Selection(self.channel_map, first), reference, train_second, self.steps_done)
        self._round = Round(
            self.pair, self.rounds.reference, length, self.forward, self.ranks.world_size, self.steps_done
        )
        if self.rounds.check_ranks:
            self._check_ranks()
        return self._round

    def _finish_round(self, current: Round) -> None:
        # Reading the losses first raises before anything that is not finite can reach the store.
        self._learn(current)
        trained_second = self.rounds.reference == "turns" and current.steps > 1
        for side in self.pair.trained_sides(trained_second):
            average(side.arrays[BUFFERS], self.ranks.world_size)
        if self.rounds.check_ranks:
            self._check_ranks()
        self.pair.save(trained_second)
        self._round = None
        self.rounds_done += 1

    def _learn(self, current: Round) -> None:
        """Read the losses of the steps since the last time and move s; within a round masks do not depend on
        s.
        """
        assert self._masks is not None
        for entry in current.flush():
            if entry.difference is not None and not self.frozen:
                self.policy.update(entry.difference, *self._masks)
            self._pending.append(entry)

    def _choose_final_mask(self) -> None:
        """Draw masks from p(m|s), keep the best by training loss (Zhou et al. 2021, final sampling)."""
        candidates = self.policy.candidates(self.final.candidates)
        recent = list(self._recent)
        self.forward_flops += len(recent) * sum(self.cost.flops(mask) for mask in candidates)
        self.final_mask = best_candidate(
            self.pair, self.channel_map, candidates, recent, self.forward, self.ranks
        )
        self.policy.freeze()
        self._recent.clear()

    def _count_flops(self, current: Round) -> None:
        assert self._masks is not None
        trained, evaluated = roles(self.rounds.reference, current.steps, self.pair.same)
        self.forward_flops += 3 * self.cost.flops(self._masks[trained])
        if evaluated is not None:
            self.forward_flops += self.cost.flops(self._masks[evaluated])

    def _reestimate(self, module: nn.Module, batches: Iterable[Any]) -> None:
        if not self.forward.frozen_batch_norm:
            reestimate_batch_norm(module, batches, self._averaged)

    def _averaged(self, tensor: Tensor) -> Tensor:
        average(tensor, self.ranks.world_size)
        return tensor

    def _check_ranks(self) -> None:
        assert self._masks is not None
        weights = [self.pair.sides[0].arrays[WEIGHTS]]
        if not self.pair.same:
            weights.append(self.pair.sides[1].arrays[WEIGHTS])
        assert_equal_on_ranks(
            {"keep probabilities": [self.policy.s], "masks": list(self._masks), "subnet weights": weights},
            self.ranks.world_size,
            self.device,
        )
