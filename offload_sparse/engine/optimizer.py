"""torch's own optimizers over one flat parameter, with their state in buffers that the store gathers and
scatters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offload_sparse.engine.config import OptimConfig


def slot_names(config: OptimConfig) -> tuple[str, ...]:
    """State tensors that the optimizer keeps per weight, under torch's names."""
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum > 0 else ()


def build_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The torch optimizer that ``config`` describes."""
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


class FlatOptimizer:
    """One optimizer step over the flat weights of a subnet; its state lives in the given slot buffers.

    A fresh zero momentum buffer makes torch's first step equal to its own first step, so absent channels that
    come back simply carry on where they stopped. The bias correction of AdamW counts the steps of the whole
    run, not of a channel.

    Args:
        config: which optimizer, and its constants.
        weights: flat parameters of the subnet; updated in place.
        gradients: flat gradients.
        slots: flat state buffers by the names of ``slot_names``; updated in place.
    """

    def __init__(
        self,
        config: OptimConfig,
        weights: Tensor,
        gradients: Tensor,
        slots: Mapping[str, Tensor],
    ) -> None:
        self._clip_norm = config.clip_norm
        self._flat = nn.Parameter(weights)
        self._flat.grad = gradients
        self._optimizer = build_optimizer([self._flat], config)
        state: dict[str, Tensor] = dict(slots)
        self._step = torch.zeros((), dtype=torch.float32, device=weights.device)
        if config.name == "adamw":
            state["step"] = self._step
        self._optimizer.state[self._flat].update(state)

    def step(self, lr: float, steps_done: int, found_inf: Tensor | None = None) -> None:
        """Clip (if configured) and apply the gradients with learning rate ``lr``.

        Args:
            lr: learning rate.
            steps_done: optimizer steps of the run before this one, on whichever subnet.
            found_inf: float32 scalar on the device; weights and slots stay as they are unless it is 0.
                Nothing waits for its value.
        """
        if self._clip_norm > 0:
            nn.utils.clip_grad_norm_([self._flat], self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._step.fill_(steps_done)
        # torch's fused optimizers read this attribute, as they do for torch.amp.GradScaler.
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._optimizer.step()
