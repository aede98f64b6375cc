"""``SparseOffload``: what a training loop holds.

session = SparseOffload(model, (images,), optimizer=OptimConfig(lr=0.1), rho=0.25, total_steps=steps)
for x, y in loader:  # sample, gather, K steps, estimate, scatter happen inside
    loss = session.step(lambda network: F.cross_entropy(network(x), y))
network = session.finalize()  # network.module is an ordinary narrow nn.Module
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import Residual
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import fit_attributes, meta_copy, set_tensor
from offload_sparse.engine.batch_norm import Run, reestimate_batch_norm
from offload_sparse.engine.config import (
    FinalConfig,
    OnNonFinite,
    OptimConfig,
    RoundConfig,
    check_combination,
)
from offload_sparse.engine.distributed import averaged
from offload_sparse.engine.forward import Closure, Forward, bound
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.optimizer import slot_names
from offload_sparse.engine.preparation import ModelSource, prepare
from offload_sparse.engine.rounds import Ask, Rounds
from offload_sparse.engine.subnet_pair import Side
from offload_sparse.engine.transfers import Transfers
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.width_search import build_policy
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.host_memory import pin_mode
from offload_sparse.store.tiers import Identity, Mode, open_tier
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore


class SparseOffload(Rounds):
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
        example_inputs: tuple[Tensor, ...],
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
        rounds = rounds or RoundConfig()
        self.optim = optimizer or OptimConfig()
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ranks = Ranks.current()
        storage = store or StoreConfig()
        shard = Ranks.current(per_node=True) if storage.shard == "node" else ranks
        prepared = prepare(model, example_inputs, residual, ranks, channel_map, verify, block)
        self.meta_model = prepared.meta_model
        self._example_inputs = example_inputs
        self._factory = partial(copy.deepcopy, self.meta_model) if isinstance(model, nn.Module) else model
        pin = pin_mode(storage.pin, self.device)
        slots = slot_names(self.optim)
        identity = Identity.of(run_id, prepared.channel_map, dtype, ranks.world_size, ranks.rank)
        self.tier = open_tier(storage.tier, Path(storage.path or "store"), identity, dtype, pin, store_mode)
        names = prepared.tensor_names()
        self.store = WeightStore(prepared.channel_map, *names, slots, dtype, shard, self.tier)
        if self.tier.filled:
            self.store.integer_buffers = self.tier.integers()
        else:
            prepared.fill(self.store, seed)
            self.tier.complete(self.store.integer_buffers)
        cost = CostModel(self.meta_model, prepared.channel_map, example_inputs)
        probabilities = policy or PolicyConfig()
        if rho is not None:
            probabilities = dataclasses.replace(probabilities, rho=rho)
        chosen = probabilities.resolved(compile)
        check_combination(chosen, rounds)
        freeze_step = None if total_steps is None else round(rounds.freeze_at * total_steps)
        masks = build_policy(chosen, prepared.channel_map.groups, seed, cost, freeze_step, total_steps)
        transfers = Transfers(
            self.store,
            self.meta_model,
            self.optim,
            self.device,
            masks.size_cap,
            delta=rounds.delta and not masks.trivial,
            overlap=not masks.trivial and rounds.overlaps(self.device.type == "cuda"),
        )
        if compile:
            transfers.compile()
        super().__init__(
            prepared.channel_map,
            masks,
            transfers,
            cost,
            ranks,
            forward or Forward(),
            rounds,
            final or FinalConfig(),
            on_nonfinite,
            sys.maxsize if freeze_step is None else freeze_step,
        )

    # --- the loop ---

    def step(self, closure: Closure | Sequence[Closure], lr: float | None = None) -> Tensor:
        """One optimizer step; begins and ends rounds as needed.

        Args:
            closure: network -> mean loss of this rank's part of the batch, or (mean loss, {name: scalar}). It
                is called twice, once for each subnet, and again when the final mask is chosen. A list of
                closures is a batch in parts, whose gradients are averaged.
            lr: learning rate of this step; the configured one if None.

        Returns:
            the loss averaged over ranks, a scalar on the device.

        Raises:
            ValueError: a closure returns no loss, or none that depends on the network.
            FloatingPointError: a loss or gradient was not finite, with ``on_nonfinite`` ``stop``. It is
                noticed when records are read or the round ends; the step itself has moved nothing.
        """
        closures = [closure] if callable(closure) else list(closure)
        self._recent.append([bound(each) for each in closures])
        self.lr = self.optim.lr if lr is None else lr
        loss = self._ask(closures)
        assert loss is not None
        return loss

    def freeze(self) -> None:
        """Choose the final mask when the present round ends, and train it from then on."""
        self.freeze_step = min(self.freeze_step, self.steps_done)

    def records(self) -> list[StepRecord]:
        """What the steps since the last call measured. Waits for the device."""
        self.catch_up()
        records, self._pending = self._pending, []
        return records

    def settle(self) -> None:
        """Bring the store up to date; until then the subnets in training may hold newer weights. No transfer
        is under way then, so that the store can be read and written.
        """
        self.transfers.settle()

    def expected_cost(self, rounds: int = 8) -> tuple[float, float]:
        """Mean parameters and FLOPs of the subnets of the next ``rounds`` rounds as s is now, or of the final
        mask once it is chosen: shares of the full network.
        """
        masks = [self.final_mask] if self.final_mask is not None else []
        for ahead in range(0 if masks else rounds):
            masks += self.policy.sample(self.rounds_done + ahead)
        parameters = sum(self.cost.parameters(mask) for mask in masks) / len(masks)
        flops = sum(self.cost.flops(mask) for mask in masks) / len(masks)
        return parameters / self.cost.dense_parameters, flops / self.cost.dense_flops

    @contextmanager
    def evaluation(self, batches: Iterable[Any]) -> Iterator[nn.Module]:
        """The subnet now in training, with BatchNorm statistics of ``batches``. Every rank calls it."""
        self._join()
        side = self._open().sides[0]
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
        out. Every rank calls it; one that has had fewer batches waits here for the others.

        Args:
            batches: training batches for the statistics, in the form that the module takes as input; the last
                ``final.selection_batches`` of the training if None.

        Returns:
            the narrow network, an ordinary ``nn.Module`` with its own memory, and its mask.
        """
        self._join()
        self._ask(Ask.FINISH)
        if self.final_mask is None:
            self._choose_final_mask()
        assert self.final_mask is not None
        side = self.transfers.scratch()
        side.load(Selection(self.channel_map, self.final_mask), (WEIGHTS, BUFFERS))
        side.bind(None)
        module = self._extract(side)
        self.transfers.close()
        if batches is None:
            recent = chain.from_iterable(self._recent)
            self._reestimate(module, recent, lambda network, closure: closure(network))
        else:
            self._reestimate(module, batches)
        return FinalNetwork(module, self.final_mask, self.channel_map, self._factory, self._example_inputs)

    def _extract(self, side: Side) -> nn.Module:
        """The network that ``side`` holds, as a module with memory of its own, in evaluation mode."""
        module = meta_copy(self.meta_model)
        for name, own in list(side.module.named_parameters()):
            value = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
            set_tensor(module, name, value)
        for name, buffer in list(side.module.named_buffers()):
            set_tensor(module, name, buffer.detach().clone())
        fit_attributes(module)
        set_additions(module, side.selection, self.device)
        return module.eval()

    def _reestimate(self, module: nn.Module, batches: Iterable[Any], run: Run = nn.Module.__call__) -> None:
        if not self.forward.frozen_batch_norm:
            reestimate_batch_norm(module, batches, partial(averaged, world_size=self.ranks.world_size), run)
