"""The method of the project: sampled channel subnetworks, trained K steps at a time out of a store in host
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from offload_sparse.engine.finalize import FinalNetwork
from offload_sparse.engine.rounds import StepRecord
from offload_sparse.engine.session import SparseOffload
from offload_sparse.methods.method import Costs, Method, Task


class SparseOffloadMethod:
    """Drives a ``SparseOffload`` session."""

    def __init__(self, session: SparseOffload, task: Task) -> None:
        self.session = session
        self._loss_fn = task.loss_fn

    def train_step(self, batch: Any, lr: float) -> None:
        self.session.step(batch, self._loss_fn, lr)

    def records(self) -> list[StepRecord]:
        return self.session.records()

    def status(self) -> dict[str, float]:
        policy = self.session.policy
        return {
            "expected_size": policy.expected_size / max(1, self.session.channel_map.num_atoms),
            "entropy": policy.entropy,
            "frozen": float(self.session.frozen),
        }

    def dynamics(self) -> dict[str, float]:
        params_ratio, flops_ratio = self.session.expected_cost()
        return {"params_ratio": params_ratio, "flops_ratio": flops_ratio}

    def evaluation(self, batches: Iterable[Tensor]) -> AbstractContextManager[nn.Module]:
        return self.session.evaluation(batches)

    def finalize(self, batches: Iterable[Tensor]) -> FinalNetwork:
        return self.session.finalize(batches)

    def costs(self) -> Costs:
        session = self.session
        full = session.channel_map.full_mask()
        return Costs(
            session.forward_flops,
            session.cost.flops(full),
            session.cost.parameters(full),
            session.store.nbytes,
            session.pair.bytes_peak,
        )


def build(task: Task) -> Method:
    """A session for ``task``."""
    config = task.config
    session = SparseOffload(
        task.factory,
        task.example_inputs,
        total_steps=task.total_steps,
        policy=config.policy,
        rounds=config.round,
        optimizer=config.optim,
        final=config.final,
        residual=config.model.residual,
        block=config.atoms.block,
        seed=config.train.seed,
        device=task.device,
        dtype=task.dtype,
        forward=task.forward,
        verify=config.train.verify,
    )
    return SparseOffloadMethod(session, task)
