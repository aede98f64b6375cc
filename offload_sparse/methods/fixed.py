"""A network whose structure never changes, trained by DistributedDataParallel: what both controls are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offload_sparse.engine.batch_norm import reestimate_batch_norm
from offload_sparse.engine.finalize import FinalNetwork
from offload_sparse.engine.optimizer import build_optimizer
from offload_sparse.engine.rounds import StepRecord
from offload_sparse.engine.sync import average
from offload_sparse.methods.method import Costs, Task
from offload_sparse.structure.accounting import CostModel
from offload_sparse.structure.channel_map import ChannelMap


class FixedNetwork:
    """Trains ``module`` as it stands.

    Args:
        task: what is trained.
        module: the network, with its initial weights.
        channel_map: map of the full network.
        mask: the atoms that ``module`` keeps.
        cost: cost model of the full network.
    """

    def __init__(
        self, task: Task, module: nn.Module, channel_map: ChannelMap, mask: Tensor, cost: CostModel
    ) -> None:
        self._task = task
        self._channel_map, self._mask, self._cost = channel_map, mask, cost
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.module = module.to(task.device, task.dtype)
        self._parallel: nn.Module = self.module
        if self._world_size > 1:
            device_ids = [task.device] if task.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(self.module, device_ids=device_ids)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(parameters, task.config.optim)
        self._steps = 0
        self._pending: list[tuple[Tensor, tuple[str, ...]]] = []

    def train_step(self, batch: Any, lr: float) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        loss, metrics = self._task.forward.trained(self._parallel, batch, self._task.loss_fn)
        loss.backward()
        if self._task.config.optim.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._task.config.optim.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        scalars = torch.stack([loss.detach(), *(m.detach() for m in metrics.values())]).to(torch.float64)
        self._pending.append((scalars, tuple(metrics)))
        self._steps += 1

    def records(self) -> list[StepRecord]:
        if not self._pending:
            return []
        values = torch.stack([scalars for scalars, _ in self._pending])
        average(values, self._world_size)
        names = [n for _, n in self._pending]
        first = self._steps - len(names)
        self._pending.clear()
        records = []
        for i, (row, metric_names) in enumerate(zip(values.tolist(), names, strict=True)):
            if not all(map(math.isfinite, row)):
                raise FloatingPointError(
                    f"the loss of step {first + i} is not finite; lower optim.lr or set optim.clip_norm"
                )
            records.append(StepRecord(row[0], None, dict(zip(metric_names, row[1:], strict=True))))
        return records

    def status(self) -> dict[str, float]:
        return {"expected_size": float(self._mask.float().mean()) if self._mask.numel() else 1.0}

    def dynamics(self) -> dict[str, float]:
        cost = self._cost
        return {
            "params_ratio": cost.parameters(self._mask) / cost.dense_parameters,
            "flops_ratio": cost.flops(self._mask) / cost.dense_flops,
        }

    @contextmanager
    def evaluation(self, batches: Iterable[Tensor]) -> Iterator[nn.Module]:
        del batches  # the structure stands still, so the running statistics are good
        yield self.module

    def finalize(self, batches: Iterable[Tensor]) -> FinalNetwork:
        if not self._task.forward.frozen_batch_norm:
            reestimate_batch_norm(self.module, batches, self._averaged)
        return FinalNetwork(self.module.eval(), self._mask, self._channel_map)

    def costs(self) -> Costs:
        full = self._channel_map.full_mask()
        tensors = [*self.module.parameters(), *self.module.buffers()]
        tensors += [p.grad for p in self.module.parameters() if p.grad is not None]
        tensors += [v for s in self._optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return Costs(
            3.0 * self._cost.flops(self._mask) * self._steps,
            self._cost.flops(full),
            self._cost.parameters(full),
            0,
            sum(t.numel() * t.element_size() for t in tensors),
        )

    def _averaged(self, tensor: Tensor) -> Tensor:
        average(tensor, self._world_size)
        return tensor
