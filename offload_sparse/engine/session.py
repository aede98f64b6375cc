"""``SparseOffload``: what a training loop holds.

session = SparseOffload(MyModel, (images,), partial(torch.optim.SGD, lr=0.1), rho=0.25, total_steps=10_000)
for x, y in loader:  # sample, gather, K steps, estimate, scatter happen inside
    loss = session.step(lambda network: F.cross_entropy(network(x), y))
network = session.finalize()  # network.module is an ordinary narrow nn.Module
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import Residual, chosen_block
from offload_sparse.channels.model_call import move_inputs
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import fit_attributes, meta_copy, tensor_setter
from offload_sparse.engine.averaging import EMA, OUTER
from offload_sparse.engine.batch_norm import Run, flags_restored, reestimate_batch_norm
from offload_sparse.engine.config import FinalConfig, OnNonFinite, RoundConfig, check_combination
from offload_sparse.engine.distributed import average, everyones, on_every_rank, require_equal
from offload_sparse.engine.family import own_entries, start_own_norms, with_own_norms
from offload_sparse.engine.forward import Closure, Forward, bound, in_parts
from offload_sparse.engine.importance import Importance
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.optimizer import (
    Grouping,
    OptimizerFactory,
    SubnetOptimizer,
    group_parameters,
    probe,
)
from offload_sparse.engine.preparation import ModelSource, PreparedModel, prepare
from offload_sparse.engine.pretrained import FittedWeights, WeightSource
from offload_sparse.engine.request import Ask
from offload_sparse.engine.rounds import Rounds
from offload_sparse.engine.state import load_state, whole_state
from offload_sparse.engine.subnet_pair import Side
from offload_sparse.engine.transfers import Transfers
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.width_search import build_policy
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.host_memory import pin_mode
from offload_sparse.store.tiers import Identity, Mode, open_tier
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore


@dataclass
class Setup:
    """What is rarely set.

    Attributes:
        residual: residual policy of the discovery.
        channel_map: a map made by hand, instead of the discovery.
        block: channels per atom, as ``atoms.block`` of a run; budgets, caps and minimum widths count atoms. A
            map made by hand stays as it is with ``auto``.
        verify: check slice = mask on the model before anything trains.
        compile: compile the forward passes of the subnets; ``policy.sampler auto`` then keeps widths fixed.
        final: how the final mask is chosen.
        on_nonfinite: what a step whose loss or gradient is not finite leads to, beside moving nothing itself:
            ``stop`` raises, ``skip`` goes on with the next batch, ``rollback`` goes on from the end of the
            round before, or a ``state_dict`` since (which costs the bus a full subnet per round).
        dtype: type of weights, slots, gradients and buffers; a buffer of more bits than all weights stays.
        store: where the weights are.
        run_id: what a store in files is known by.
        store_mode: ``new`` initialises the weights; ``resume`` opens the files of an interrupted run instead;
            ``replace`` initialises whatever files of this run there are.
        local_from: with ``round.sync round``, steps of training after which ranks talk once per round;
            before, at every step.
        members: networks smaller than the final one that its caller trains with it, each with norms of its
            own (``engine.family``).
        widths: with ``policy.search`` ``probe`` or ``none``, those of the first mask, as ``static.widths``.
    """

    residual: Residual = "coupled"
    channel_map: ChannelMap | None = None
    block: str | int = "auto"
    verify: bool = True
    compile: bool = False
    final: FinalConfig = dataclasses.field(default_factory=FinalConfig)
    on_nonfinite: OnNonFinite = "stop"
    dtype: torch.dtype = torch.float32
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    run_id: str = ""
    store_mode: Mode = "new"
    local_from: int = 0
    members: int = 0
    widths: str = ""


class SparseOffload(Rounds):
    """Trains a network whose full weights live in host memory through sampled channel subnetworks.

    Args:
        model: a function that builds the network (its initialisation is then replayed shard by shard, and no
            rank holds the whole network), or a network whose present weights are the start.
        example_inputs: tensors that the network can be called with.
        optimizer: parameters -> optimizer, such as ``partial(torch.optim.AdamW, lr=1e-3)``; any one whose
            step of a weight depends on that weight alone.
        rho: remaining ratio; shorthand for the one of ``policy``.
        total_steps: optimizer steps of the run, of the rank that makes most; ``rounds.freeze_at`` is a share
            of it. Without it the final mask is chosen by ``freeze`` or, untrained, by ``finalize``.
        groups: name of a parameter -> settings of its group, such as ``{"lr": 0.01}``; None for the
            optimizer's.
        no_decay: no weight decay of vectors (biases, scales and shifts of norms).
        clip_norm: largest norm of the gradient of a subnet; 0 clips nothing.
        ema: decay of a moving average of the weights, kept from the choice of the final mask on; evaluation
            and the final network take it. 0 keeps none.
        forward: autocast, scaler and BatchNorm mode of forward passes.
        policy, rounds: how the keep probabilities are learned, and what happens between two draws of masks.
        setup: what is rarely set.
        weights: values to start from, in place of the network's own: a file, a folder or a run, see
            ``engine.pretrained.WeightSource``. Each rank reads its own rows; the first one may
            read the whole for its checksums. A policy that names no search then keeps a one-shot cut.
        seed: seed of the initial weights and of the masks.
        device: where subnets compute; the CUDA device when there is one.

    Attributes:
        device: where subnets compute; a closure's batch has to be there, such as by ``x.to(session.device)``.
        optimizer: shows the parameter groups, for schedulers of ``torch.optim.lr_scheduler``; its parameters
            are stand-ins.

    Raises:
        ValueError: the model cannot be narrowed, the optimizer cannot be used, or an argument is out of
            range; says what to change.
    """

    def __init__(
        self,
        model: ModelSource,
        example_inputs: Tensor | Sequence[Tensor],
        optimizer: OptimizerFactory,
        *,
        rho: float | None = None,
        total_steps: int | None = None,
        groups: Grouping | None = None,
        no_decay: bool = False,
        clip_norm: float = 0.0,
        ema: float = 0.0,
        forward: Forward | None = None,
        policy: PolicyConfig | None = None,
        rounds: RoundConfig | None = None,
        setup: Setup | None = None,
        weights: str | os.PathLike[str] | FittedWeights | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= ema < 1 or clip_norm < 0:
            raise ValueError(f"ema is {ema}, clip_norm {clip_norm}; give a decay in [0, 1) and a norm >= 0")
        setup, rounds, forward = setup or Setup(), rounds or RoundConfig(), forward or Forward()
        if ema and torch.finfo(setup.dtype).bits < 32:
            raise ValueError(f"an average in {setup.dtype} stands still; set ema to 0 or dtype to float32")
        if (default := torch.get_default_device()).type != "cpu":
            raise ValueError(f"torch.set_default_device({str(default)!r}) is no place for a store; remove it")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        bare = isinstance(example_inputs, Tensor)
        self._example_inputs = (example_inputs,) if bare else tuple(example_inputs)
        chosen = _policy(policy, rho, setup, rounds, weights is not None)
        ranks = Ranks.current()
        call = {"seed": seed, "no_decay": no_decay, "clip_norm": clip_norm, "ema": ema}
        parts = chosen, rounds, setup, setup.final
        total_steps, counted = _agreed(ranks, total_steps, self._example_inputs, call, *parts)
        freeze_step = None if total_steps is None else rounds.freeze_step(chosen.search, total_steps)
        shard = Ranks.current(per_node=True) if setup.store.shard == "node" else ranks
        kept = probe(optimizer, self.device)
        by_hand = setup.channel_map is not None and setup.block == "auto"
        block = 1 if by_hand else chosen_block(setup.block, self.device.type)
        inputs, given = self._example_inputs, setup.channel_map
        prepared = prepare(model, inputs, setup.residual, given, setup.verify, block)
        cost = CostModel(prepared.meta_model, prepared.channel_map, counted)
        self._factory = partial(copy.deepcopy, prepared.meta_model) if isinstance(model, nn.Module) else model
        model_of_all, channel_map = with_own_norms(prepared.meta_model, prepared.channel_map, setup.members)
        with_members = dataclasses.replace(prepared, meta_model=model_of_all, channel_map=channel_map)
        self.meta_model = model_of_all
        parameter_groups = group_parameters(self.meta_model, groups, no_decay)
        states = [probe(optimizer, self.device, g.settings) if g.settings else kept for g in parameter_groups]
        weights_optimizer = SubnetOptimizer(optimizer, parameter_groups, states, self.device, clip_norm)
        averages = [*([EMA] if ema else []), *([OUTER] if rounds.outer_momentum else [])]
        slots = (*weights_optimizer.slots, *averages)
        order = list(chain.from_iterable(group.names for group in parameter_groups))
        self.store = _store(with_members, order, slots, setup, ranks, shard, self.device)
        if not self.store.tier.filled:
            if isinstance(weights, str | os.PathLike):
                weights = WeightSource(weights).fitted(prepared.meta_model)
            prepared.fill(self.store, seed, weights)
            for name, slot, value in weights_optimizer.initial():
                self.store.own_rows(name, slot).fill_(value)
            self.store.tier.complete(self.store.integer_buffers)
        known = None
        if chosen.start != "uniform":
            known = Importance.of_store(chosen.start, self.store, self.meta_model, seed)
        steps = freeze_step, total_steps
        masks = build_policy(chosen, channel_map, seed, cost, *steps, known, setup.widths)
        transfers = Transfers(
            self.store,
            self.meta_model,
            weights_optimizer,
            self.device,
            masks.size_cap + own_entries(channel_map),
            pairs=1 if masks.stays else rounds.pairs,
            overlap=not masks.stays and rounds.overlaps(self.device.type == "cuda"),
        )
        if setup.compile:
            transfers.compile()
        super().__init__(
            masks,
            transfers,
            cost,
            ranks,
            forward,
            rounds,
            setup.final,
            setup.on_nonfinite,
            0 if chosen.search == "none" else sys.maxsize if freeze_step is None else freeze_step,
            ema,
            (freeze_step or 0) // 2 if chosen.search == "forward" else 0,
            setup.local_from,
        )
        self._members, self._ended, self._evaluating = setup.members, False, False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.transfers.optimizer.shown

    # --- the loop ---

    def step(self, closure: Closure | Sequence[Closure]) -> Tensor:
        """One optimizer step; begins and ends rounds as needed.

        A rank with fewer batches waits for the others in ``evaluation``, ``finalize``, ``settle`` or
        ``state_dict``, the same one on all of them, and goes on with what they have trained; a scheduler that
        is called with every batch then has to catch up:
        ``while scheduler.last_epoch < session.steps_done: scheduler.step()``. A parameter that no loss of a
        step reaches has a gradient of zero: decay and momentum go on moving it, as torch does not.

        Args:
            closure: network -> mean loss of this rank's part of the batch, or (mean loss, {name: scalar}). It
                is called twice, once for each subnet, and again when the final mask is chosen. A list of
                closures is a batch in parts, whose gradients are averaged.

        Returns:
            the loss averaged over ranks, a scalar on the device.

        Raises:
            ValueError: a closure returns no loss, or none that depends on the network; a buffer changes its
                shape; the session has ended.
            FloatingPointError: a loss or gradient was not finite, with ``on_nonfinite`` ``stop``, or many
                were. It is noticed when records are read or the round ends; the step itself has moved
                nothing.
        """
        closures = in_parts(closure)
        self._check_open()
        batch, first = (self.steps_done, [bound(each) for each in closures]), not self._recent
        if first:  # which may begin with the choice of the final mask
            self._recent.append(batch)
        try:
            loss = self._ask(closures)
        except BaseException:
            if first:
                self._recent.pop()  # neither the final mask nor a probe is to meet it again
            raise
        assert loss is not None
        if not first:
            self._recent.append(batch)
        self.transfers.optimizer.count_step()
        return loss

    def freeze(self) -> None:
        """Choose the final mask when the present round ends, and train it from then on; what one rank asks
        counts for all."""
        self.asked_freeze = min(self.freeze_step, self.steps_done)

    def records(self) -> list[StepRecord]:
        """What the steps since the last call measured, the last 100,000 of them. Waits for the device; every
        rank calls it at the same step."""
        self.catch_up()
        records = self.unread_records
        self._pending.clear()
        return records

    @property
    def unread_records(self) -> list[StepRecord]:
        """Those that ``records`` would return without waiting."""
        return list(self._pending)

    def settle(self) -> None:
        """Bring the store up to date; until then the subnets in training may hold newer weights. No transfer
        is under way then, so that the store can be read and written. Every rank calls it."""
        self._check_not_evaluating()
        self.join("settle")
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
    def evaluation(self, batches: Iterable[Any] | None = None) -> Iterator[nn.Module]:
        """The subnet now in training, in evaluation mode; of a round that ranks train by themselves their
        mean, or each rank's own where they differ. Every rank enters it; one that has had fewer batches waits
        here for the others.

        Args:
            batches: training batches for the BatchNorm statistics, such as a loader; of one with more parts
                than the network has inputs, the first ones are its inputs. The last ones of the training if
                None.
        """
        with torch.inference_mode(False):  # what begins here is trained on
            self._check_open()
            self.join("evaluation")
            if batches is None:
                self.catch_up()  # which tells the batches that were left out
            side = self._open().sides[0]
        ema = side.arrays.get(EMA) if self.ema_steps else None
        kinds = () if ema is None and not self.local else (WEIGHTS,)
        self.forward.train_mode(side.module)
        self._evaluating = True
        try:
            # Other batch sizes and modes than those of training are not worth compiling for.
            eager = torch.compiler.set_stance("force_eager")
            with side.put_back(*kinds), flags_restored(side.module), eager:
                if ema is not None:
                    side.arrays[WEIGHTS].copy_(ema)
                if self.local and not self.own_subnets:
                    average(side.arrays[WEIGHTS], self.ranks.world_size)
                self.reestimate(side.module, batches)
                torch.clear_autocast_cache()  # of weights that are others now, if all this is in one autocast
                yield side.module.eval()
        finally:
            self._evaluating = False
            torch.clear_autocast_cache()

    def finalize(self, batches: Iterable[Any] | None = None) -> FinalNetwork:
        """End the training: choose the mask if that has not happened, re-estimate BatchNorm, take the network
        out. Every rank calls it; one that has had fewer batches waits here for the others. ``batches`` are
        those of ``evaluation``.

        Returns:
            the narrow network, an ordinary ``nn.Module`` with its own memory, and its mask."""
        self._check_open()
        self.join("finalize")
        self._ask(Ask.FINISH)
        if self.final_mask is None:
            self._warn_of_untrained_mask()
            self._choose_final_mask()
        assert self.final_mask is not None
        side = self.transfers.scratch()
        side.load(self.transfers.selection(self.final_mask), (WEIGHTS, BUFFERS))
        if self.ema_steps:
            self.store.gather(side.weights, EMA, side.arrays[WEIGHTS])
        module = self._extract(side)
        self.transfers.close()
        self.reestimate(module, batches)
        self._ended = True
        # What is left must not live until the interpreter ends, when process groups cannot be freed any more.
        self._drop_round()
        self._recent.clear()
        network = module.eval()
        return FinalNetwork(network, self.final_mask, self.channel_map, self._factory, self._example_inputs)

    def close(self, abandon: bool = False) -> None:
        """End the work beside the loop and free the store's process groups, before the loop destroys its own.
        A session that is left without ``finalize`` needs it. It cannot be used any more. ``abandon``: a rank
        may be gone, so that what is under way might never end."""
        if abandon:
            self.store.ranks.abort()
        self.transfers.close(abandon)
        for ranks in (self.ranks, self.store.ranks):
            ranks.close()
        self._ended = True

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, in the middle of a round too; torch's own generators are
        the loop's. Every rank calls it. Rank 0 returns the rows of all ranks (it then holds the whole state),
        the others what is small: ``torch.save`` it on rank 0, register the session with
        ``accelerator.register_for_checkpointing``, or give it to ``torch.distributed.checkpoint``.
        """
        self._check_open()
        self.join("state_dict")
        self.catch_up()
        return whole_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume bit for bit from what ``state_dict`` returned, on any number of ranks (what ranks have of
        their own in a round, BatchNorm statistics for instance, is averaged on another number; subnets per
        rank need as many). Every rank calls it; rank 0 has the rows.

        The final mask is chosen on the last batches: if fewer than ``final.selection_batches`` steps are left
        to its choice, give those before to ``remember``, in order.

        Raises:
            ValueError: the state belongs to another model, policy or optimizer.
        """
        self._check_not_evaluating()
        load_state(self, state)
        self._ended = False

    # --- parts ---

    def _choose_final_mask(self) -> None:
        super()._choose_final_mask()
        assert self.final_mask is not None
        if self._members:
            start_own_norms(self.transfers, self.final_mask)

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError("finalize has ended this session; build a new one, or load a state into it")
        self._check_not_evaluating()

    def _check_not_evaluating(self) -> None:
        if self._evaluating:  # its weights and statistics are not those of the training
            raise ValueError("an evaluation goes on; leave its with block first")

    def _warn_of_untrained_mask(self) -> None:
        if self.steps_done < self.freeze_step and isinstance(self.policy, MaskPolicy):
            known = self.freeze_step < sys.maxsize
            search = f"which takes {self.freeze_step}" if known else "which total_steps or freeze() would end"
            warnings.warn(
                f"finalize after {self.steps_done} steps of the search, {search}: the mask is chosen now, "
                "and nothing has trained the network that it gives",
                stacklevel=3,
            )

    def _extract(self, side: Side) -> nn.Module:
        """The network that ``side`` holds, as a module with memory of its own."""
        module = meta_copy(self.meta_model)
        set_tensor = tensor_setter(module)
        for name, own in list(side.module.named_parameters()):
            value = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
            set_tensor(name, value)
        for name, buffer in list(side.module.named_buffers()):
            set_tensor(name, buffer.detach().clone())
        fit_attributes(module)
        set_additions(module, side.selection, self.device)
        return module

    def reestimate(self, module: nn.Module, batches: Iterable[Any] | None) -> None:
        """Replace the BatchNorm statistics by those of ``batches``, or of the last closures."""
        if self.forward.frozen_batch_norm:
            return
        run: Run = self._run
        if batches is None:
            batches, run = self.recent, self.forward.loss
        alone = self.own_subnets or self.ranks.world_size == 1
        mean = None if alone else partial(average, world_size=self.ranks.world_size)
        reestimate_batch_norm(module, islice(batches, self.final.bn_batches), mean, run)

    def _run(self, network: nn.Module, batch: Any) -> object:
        """Put a batch through the network: as many of its parts as that has inputs."""
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        inputs = move_inputs(tuple(parts[: len(self._example_inputs)]), self.device)
        return self.forward.run(network, lambda module: module(*inputs))


def _agreed(
    ranks: Ranks, total_steps: int | None, inputs: tuple[Any, ...], call: dict[str, Any], *parts: object
) -> tuple[int | None, tuple[Any, ...]]:
    """The steps of the run, and inputs to count FLOPs by, the same for all ranks: these may have different
    numbers of batches, of other lengths. Raises ValueError (on every rank): their settings differ."""
    if ranks.world_size == 1:
        if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            warnings.warn(
                f"{started} processes were started, but there is no process group, and each trains alone; "
                "make an Accelerator, or call torch.distributed.init_process_group(), before the session",
                stacklevel=3,
            )
        return total_steps, inputs
    named = {f"{type(of).__name__}.{name}": value for of in parts for name, value in vars(of).items()}
    plain = {n: v for n, v in (call | named).items() if isinstance(v, int | float | str | list | torch.dtype)}
    plain.pop("Setup.run_id")  # of a rank's own files
    shapes = move_inputs(inputs, "meta")
    every = everyones((total_steps, shapes, plain), ranks.world_size, ranks.host_group)
    require_equal({rank: own for rank, (*_, own) in enumerate(every)}, "give every rank the same")
    steps = [steps for steps, *_ in every if steps is not None]
    return max(steps, default=None), inputs if str(shapes) == str(every[0][1]) else every[0][1]


def _policy(
    policy: PolicyConfig | None, rho: float | None, setup: Setup, rounds: RoundConfig, pretrained: bool
) -> PolicyConfig:
    """``policy`` without ``auto``, of remaining ratio ``rho`` if given. Raises ValueError: it does not
    go with ``setup`` or ``rounds``."""
    policy = policy or PolicyConfig()
    if rho is not None:
        policy = dataclasses.replace(policy, rho=rho)
    chosen = policy.resolved(setup.compile, pretrained)
    if len(chosen.budgets) > 1 and setup.members != len(chosen.budgets) - 1:
        raise ValueError(
            "policy.budgets makes a family, which a run of the trainer trains; leave it empty in a loop of "
            "your own, or train its members there and set Setup.members to their number less one"
        )
    check_combination(chosen, rounds)
    return chosen


def _store(
    prepared: PreparedModel,
    order: Sequence[str],
    slots: tuple[str, ...],
    setup: Setup,
    ranks: Ranks,
    shard: Ranks,
    device: torch.device,
) -> WeightStore:
    """The store, with the trained parameters in ``order`` and behind them those that are not. Raises
    ValueError: a rank cannot have its part (on every rank)."""
    parameters, buffers = prepared.tensor_names(setup.dtype)
    names = (*order, *(name for name in parameters if name not in set(order)))
    identity = Identity.of(setup.run_id, prepared.channel_map, setup.dtype, ranks.world_size, ranks.rank)
    if names != parameters:  # the files of a run with other groups do not fit
        rows = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
        identity = dataclasses.replace(identity, channel_map=f"{identity.channel_map}#{rows}")
    pin, folder = pin_mode(setup.store.pin, device), Path(setup.store.path or "store")

    def opened() -> WeightStore:
        tier = open_tier(setup.store.tier, folder, identity, setup.dtype, pin, setup.store_mode)
        store = WeightStore(prepared.channel_map, names, buffers, slots, setup.dtype, shard, tier)
        if tier.filled:
            store.integer_buffers = tier.integers()
        return store

    return on_every_rank(opened)
