"""A network whose structure never changes, trained by DistributedDataParallel: what both controls are."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.engine.batch_norm import reestimate_batch_norm
from offload_sparse.engine.distributed import average, describe_fault, rank_and_world_size, ranks_where
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.nonfinite import NonFinite
from offload_sparse.engine.optimizer import first_scalars, optimizer_factory, probe
from offload_sparse.engine.state import MethodState, channels_digest
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.methods.method import Method, Task


class FixedNetwork(Method):
    """Trains ``module``, which keeps the atoms ``mask`` of the full network, as it stands.

    A step whose loss or gradient is not finite on some rank leaves weights and slots as they were, on every
    rank; with ``train.on_nonfinite`` other than ``skip`` no later step moves them either, until ``records``
    has raised the error or a state has been restored. Nothing waits for the device to find out."""

    def __init__(
        self, task: Task, module: nn.Module, channel_map: ChannelMap, mask: Tensor, cost: CostModel
    ) -> None:
        self._task = task
        self.channel_map, self._mask, self.cost = channel_map, mask, cost
        rank, self._world_size = rank_and_world_size()
        self.module = module.to(task.device, task.dtype)
        self._parallel: nn.Module = self.module
        if self._world_size > 1:
            device_ids = [task.device] if task.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(self.module, device_ids=device_ids)
        self._optimizer = optimizer_factory(task.config.optim)(self._parameter_groups())
        self._fill_slots()
        self._skips = task.config.train.on_nonfinite == "skip"
        self._halted = torch.zeros((), device=task.device)
        self._steps = 0
        self._nonfinite = NonFinite("skip" if self._skips else "stop", rank)
        self._pending: list[tuple[Tensor, tuple[str, ...]]] = []

    def train_step(self, batch: Any, lr: float) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        statistics = [b.clone() for b in self.module.buffers()] if self._skips else []
        loss, metrics = self._task.forward.trained(self._parallel, partial(self._task.loss_fn, batch=batch))
        objective = self._objective(loss)
        # A loss that is not finite makes every gradient NaN, so that the average tells all ranks.
        objective.backward(torch.ones_like(objective) + 0 * objective.detach())
        bad = self._bad_gradient()
        takes_step = self._amend_gradients()
        if self._task.config.optim.clip_norm > 0:
            weights = self._optimizer.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(weights, self._task.config.optim.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]  # torch's fused kernels then leave out the step
        if takes_step:
            self._optimizer.step()
        for buffer, before in zip(self.module.buffers(), statistics, strict=False):
            buffer.copy_(torch.where(bad > 0, before, buffer))
        self._settle()
        scalars = [loss.detach(), bad, *(m.detach() for m in metrics.values())]
        self._pending.append((torch.stack([x.to(torch.float64) for x in scalars]), tuple(metrics)))
        self._steps += 1

    def records(self) -> list[StepRecord]:
        if not self._pending:
            return []
        pending, self._pending, records = self._pending, [], []
        own = torch.stack([scalars for scalars, _ in pending])
        values = average(own.clone(), self._world_size).tolist()
        for i, (row, (_, names)) in enumerate(zip(values, pending, strict=True)):
            fault = ""
            if row[1] > 0:
                ranks = ranks_where(not bool(own[i, 0].isfinite()), self._world_size)
                fault = describe_fault(self._steps - len(pending) + i, ranks, row[0])
            else:
                records.append(StepRecord(row[0], None, dict(zip(names, row[2:], strict=True))))
            self._nonfinite.seen(fault)
        self._nonfinite.rolls_back(self._steps)
        return records

    def status(self) -> dict[str, float]:
        size = float(self._mask.float().mean()) if self._mask.numel() else 1.0
        left_out = self._nonfinite.skipped
        return {"expected_size": size} | ({"skipped_steps": float(left_out)} if left_out else {})

    def dynamics(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "params_ratio": cost.parameters(self._mask) / cost.dense_parameters,
            "flops_ratio": cost.flops(self._mask) / cost.dense_flops,
        }

    def evaluation(self, batches: Iterable[Tensor]) -> AbstractContextManager[nn.Module]:  # noqa: ARG002
        return nullcontext(self.module)  # whose structure stands still, so that its statistics are good

    def finalize(self, batches: Iterable[Tensor]) -> FinalNetwork:
        network, mask = self._final_network()
        if not self._task.forward.frozen_batch_norm:
            reestimate_batch_norm(network, batches, partial(average, world_size=self._world_size))
        origin = self._task.factory, self._task.example_inputs
        return FinalNetwork(network.eval(), mask, self.channel_map, *origin)

    def span(self, step: int) -> tuple[int, int]:  # noqa: ARG002
        return 0, self._task.total_steps

    @property
    def spent_flops(self) -> float:
        return 3.0 * self.cost.flops(self._mask) * self._steps

    def report(self) -> dict[str, Any]:
        held = [*self._tensors().values(), *self.module.buffers()]
        for group in self._optimizer.param_groups:
            held += [p.grad for p in group["params"] if p.grad is not None]
        return {"store_bytes": 0, "subnet_bytes_peak": sum(t.nbytes for t in held)}

    def state(self) -> MethodState | None:
        buffers = {f"buffers/{name}": b.detach().cpu().clone() for name, b in self.module.named_buffers()}
        tensors = {name: t.detach().cpu().clone() for name, t in self._tensors().items()}
        meta = {
            "steps_done": self._steps,
            "skipped_steps": self._nonfinite.skipped,
            "channel_map": channels_digest(self.channel_map),
            "mask": self._mask.tolist(),
        }
        # Each rank has running statistics of its own images; those of the first serve any other world size.
        return MethodState({}, tensors | buffers, buffers if self._world_size > 1 else {}, meta)

    def restore(self, state: MethodState) -> None:
        targets = self._tensors() | {f"buffers/{name}": b for name, b in self.module.named_buffers()}
        saved = state.replicated | state.local
        shapes, found = ({name: t.shape for name, t in tensors.items()} for tensors in (targets, saved))
        odd = sorted(name for name, _ in shapes.items() ^ found.items())
        if odd or state.meta.get("mask") != self._mask.tolist():
            raise ValueError(
                f"the state is of another network ({odd[0] if odd else 'other channels'} differ)"
            )
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(saved[name])
        self._steps = state.count("steps_done")
        self._nonfinite.restore(state.count("skipped_steps"))
        self._halted.zero_()
        self._pending.clear()

    # --- what another method of training a whole network does otherwise ---

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained: weights, whose gradients are clipped, and in other groups what goes with them."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def _objective(self, loss: Tensor) -> Tensor:
        """What is minimised."""
        return loss

    def _amend_gradients(self) -> bool:
        """Change the gradients, which are averaged over ranks; whether the optimizer takes its step."""
        return True

    def _settle(self) -> None:
        """The end of a step."""

    def _final_network(self) -> tuple[nn.Module, Tensor]:
        """The network that is handed out, and the atoms that it keeps."""
        return self.module, self._mask

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer slots."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[f"weights/{name}"] = parameter
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{slot}/{name}"] = value
        return tensors

    def _fill_slots(self) -> None:
        """The slots of the first step, zeros, so that they are there to be restored into."""
        kept = probe(optimizer_factory(self._task.config.optim))
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                slots = {name: torch.zeros_like(parameter) for name in kept.slots}
                scalars = first_scalars(kept, group, parameter.device)
                self._optimizer.state[parameter].update(slots | scalars)

    def _bad_gradient(self) -> Tensor:
        """1 if this step must not move the weights, else 0: a scalar on the device, equal on every rank."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        finite = torch.stack([n.isfinite() for n in torch._foreach_norm(gradients, torch.inf)]).all()
        bad = (~finite).to(torch.float32)
        if not self._skips:
            bad = self._halted.clamp_(min=bad).clone()
        return bad
