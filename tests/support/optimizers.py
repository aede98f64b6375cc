"""Optimizers as third parties write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import optim


class Lion(optim.Optimizer):
    """As third parties write it: its own class, lazy state, no fused form."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["calls"] = torch.zeros_like(p), 0
                state["calls"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((0.9 * state["exp_avg"] + 0.1 * p.grad).sign(), alpha=group["lr"])
                state["exp_avg"].mul_(0.99).add_(p.grad, alpha=0.01)


class Counting(Lion):
    """Counts steps in its group, whether or not a parameter has a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad, alpha=group["lr"] / group["step"])


class Corrected(Lion):
    """An average without bias, by a weight that is a number and not a tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["average"], state["weight"] = torch.zeros_like(p), 0.0
                state["weight"] = 1 + 0.9 * state["weight"]
                state["average"].lerp_(p.grad, 1 / state["weight"])
                p.sub_(state["average"], alpha=group["lr"])


class Numbered(Lion):
    """An average without bias, by the number of the step, which is 1 when there is first a state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                state["step"] = state.get("step", 0) + 1
                state["average"].lerp_(p.grad, 0.1)
                p.sub_(state["average"], alpha=group["lr"] / (1 - 0.9 ** state["step"]))
