"""The method of the project: sampled channel subnetworks, trained K steps at a time out of a store in host
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from offload_sparse.engine.distributed import on_every_rank, rank_and_world_size, ranks_where
from offload_sparse.engine.durable import DurableRounds
from offload_sparse.engine.family import Family, without_own_norms
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.engine.state import IN_PLACE, MethodState, restore_session, session_state
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.methods.method import Method, Task
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.store.tiers import never_filled


class SparseOffloadMethod(Method):
    """Drives a ``SparseOffload`` session."""

    def __init__(self, session: SparseOffload, task: Task, durable: DurableRounds | None) -> None:
        self.session = session
        self.channel_map, self.cost = session.channel_map, session.cost
        self.durable = durable
        self._loss_fn, self._steps = task.loss_fn, task.total_steps
        self._seed = task.config.train.seed

    def train_step(self, batch: Any, lr: float) -> None:
        session = self.session
        for group in session.optimizer.param_groups:
            group["lr"] = lr
        step = session.steps_done
        session.step(partial(self._loss, batch=batch, step=step))
        if self._trains_family:
            trained = (self._family_masks[number] for number in self._family.chosen(step))
            session.forward_flops += 3 * sum(map(session.cost.flops, trained))

    def _loss(self, network: nn.Module, batch: Any, step: int) -> Any:
        """Of the network in training; in the final phase of a family that of several members."""
        loss_fn = partial(self._loss_fn, batch=batch)
        if not self._trains_family:
            return loss_fn(network)
        return self._family.loss(loss_fn, network, self._family.chosen(step))

    @property
    def _trains_family(self) -> bool:
        """The search has ended, and several members are trained."""
        return self.session.frozen and len(self._family_masks) > 1

    @cached_property
    def _family_masks(self) -> list[Tensor]:
        """Of the members, once the search has ended."""
        policy = self.session.policy
        return policy.family() if isinstance(policy, WidthSearch) else []

    @cached_property
    def _family(self) -> Family:
        session = self.session
        return Family(
            session.meta_model, session.channel_map, self._family_masks, self._seed, session.device
        )

    def span(self, step: int) -> tuple[int, int]:
        return self.session.span(step, self._steps)

    def records(self) -> list[StepRecord]:
        return [record for record in self.session.records() if not record.fault]

    def unread_records(self) -> list[StepRecord]:
        return [record for record in self.session.unread_records if not record.fault]

    def status(self) -> dict[str, float]:
        policy = self.session.policy
        return {
            "expected_size": float(policy.s.sum()) / len(policy.s),
            "entropy": policy.entropy,
            "frozen": float(self.session.frozen),
            "bus_bytes_per_round": float(self.session.round_bytes),
            **self.session.transfers.timeline.means(),
        }

    def dynamics(self) -> dict[str, Any]:
        self.session.catch_up()
        params_ratio, flops_ratio = self.session.expected_cost()
        return {
            "params_ratio": params_ratio,
            "flops_ratio": flops_ratio,
            "subnet_bytes": self.session.transfers.nbytes,
            "round_timeline": self.session.transfers.timeline.last_rounds(),
            **self.session.policy.report(),
        }

    def evaluation(self, batches: Iterable[Tensor]) -> AbstractContextManager[nn.Module]:
        return self.session.evaluation(batches)

    def finalize(self, batches: Iterable[Tensor]) -> FinalNetwork:
        session, batches = self.session, list(batches)
        network = session.finalize(batches)
        members = {}
        for number, share in enumerate(sorted(session.policy.config.budgets)[:-1]):
            module = self._family.extract(number, network.module)
            session.reestimate(module, batches)
            members[share] = replace(network, module=module, mask=self._family_masks[number])
        without_own_norms(network.module)
        return replace(network, members=members)

    @property
    def spent_flops(self) -> float:
        return self.session.forward_flops

    def report(self) -> dict[str, Any]:
        session = self.session
        return {"store_bytes": session.store.nbytes, "subnet_bytes_peak": session.transfers.bytes_peak}

    def state(self) -> MethodState | None:
        session = self.session
        within = session.masks is not None and session.round_step > 0
        if within and session.on_nonfinite == "rollback":
            return None  # a step to come may lead back to the begin of this round, which nothing would hold
        if within and session.local and session.steps_done < self._steps and self.durable is None:
            return None  # what every rank has learned by itself would be of use to as many ranks only
        if self.durable is None:
            return session_state(self.session)
        self.durable.save()
        return MethodState(meta={IN_PLACE: self.session.steps_done})

    def restore(self, state: MethodState) -> None:
        for kept in ("_family_masks", "_family"):  # which may go back to before the search has ended
            vars(self).pop(kept, None)
        if self.durable is None:
            restore_session(self.session, state)
        elif IN_PLACE not in state.meta:
            raise ValueError("the checkpoint holds the weights of a run with store.tier ram; set it to ram")
        elif state.count(IN_PLACE) > self.session.steps_done:
            raise ValueError("the weights of the checkpoint are in the store of its own run; resume that one")
        else:
            self.durable.restore_random_state()

    def recall(self, batches: Iterable[Any]) -> None:
        if not self.session.frozen:
            self.session.remember(partial(self._loss_fn, batch=batch) for batch in batches)

    def close(self, abandon: bool) -> None:
        self.session.close(abandon)

    def while_saving(self, release: Callable[[], object]) -> None:
        self.session.transfers.before_return = release


def _name_of(run_dir: Path, store: Path) -> str:
    """What a store knows its run by: the run's folder; or the store's place in that, as both may be moved."""
    home, place = (Path(os.path.realpath(path)) for path in (run_dir, store))
    return str(place.relative_to(home) if place.is_relative_to(home) else home)


def build(task: Task) -> Method:
    """A session for ``task``; one with a store in files resumes from these by itself."""
    config = task.config
    folder = Path(config.store.path or config.run_dir / "store")
    mode, (rank, ranks) = task.store_mode, rank_and_world_size()
    # A start that died before it had filled the store on every rank leaves its config, and nothing to lose.
    begun = on_every_rank(lambda: mode == "resume" and never_filled(folder, rank))
    if ranks_where(begun, ranks) or config.store.tier == "ram":
        mode = "replace"
    setup = Setup(
        residual=config.model.residual,
        block=config.atoms.block,
        verify=config.train.check,
        compile=config.compile,
        on_nonfinite=config.train.on_nonfinite,
        dtype=task.dtype,
        store=replace(config.store, path=str(folder)),
        run_id=_name_of(config.run_dir, folder),
        store_mode=mode,
        local_from=task.warmup_steps,
        members=max(0, len(config.policy.budgets) - 1),
        widths=str(config.static.widths),
    )
    session = SparseOffload(
        task.factory,
        task.example_inputs,
        optimizer_factory(config.optim),
        total_steps=task.total_steps,
        clip_norm=config.optim.clip_norm,
        forward=task.forward,
        policy=config.policy,
        rounds=config.round,
        setup=setup,
        weights=task.weights,
        seed=config.train.seed,
        device=task.device,
    )
    durable = None if config.store.tier == "ram" else DurableRounds(session)
    if durable is not None and mode != "replace":
        durable.restore()
    return SparseOffloadMethod(session, task, durable)
