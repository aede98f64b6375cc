"""Dynamic Sparse Training: weights masked by trainable thresholds, one per output row.

Liu, Xu, Shi, Cheung & So, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable
Masked Layers" (ICLR 2020):

    M = U(|θ| - t)      loss + α Σ exp(-t)      U' ≈ 2 - 4|x|, 0.4, 0

What the text leaves open, and what is done here: thresholds start at 0; a layer of which at most 1 %
(``reset_at``) is left gets its thresholds back to 0, so that for some hundred steps most of it is there
again; thresholds have the optimizer of the weights (with its momentum) and no weight decay; the last layer is
masked as the others are; U(0) = 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offload_sparse.config.methods import DSTConfig
from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks.masked import build_masked
from offload_sparse.methods.weight_masks.sparsity import (
    MaskedWeight,
    Sparsity,
    absolute_threshold,
    by_row,
    row_sum,
    unit_step,
)


class TrainableThresholds(Sparsity):
    """Forward masks 1[|θ| ≥ t] (DST) or, ``absolute``, 1[|θ| ≥ |t|] (DFBST).

    Args:
        alpha: factor of the penalty Σ exp(-t).
        reset_at: remaining share of a layer at which its thresholds start anew; 0 for never."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        alpha: float,
        absolute: bool,
        reset_at: float = DSTConfig.reset_at,
    ) -> None:
        super().__init__(weights)
        self.alpha = alpha
        self.reset_at = reset_at
        self.absolute = absolute
        self.thresholds = nn.ParameterList(
            torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            for weight in self.weights.values()
        )

    def masked(self) -> dict[str, Tensor]:
        masked = {}
        for (name, weight), threshold in zip(self.weights.items(), self.thresholds, strict=True):
            limit = absolute_threshold(threshold) if self.absolute else threshold
            masked[name] = MaskedWeight.apply(weight, limit)
        return masked

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        return {
            name: weight.abs().sub_(by_row(threshold.abs() if self.absolute else threshold, weight)) >= 0
            for (name, weight), threshold in zip(self.weights.items(), self.thresholds, strict=True)
        }

    def penalty(self) -> Tensor:
        """α · L_s = α Σ_layers Σ_rows exp(-t)."""
        return self.alpha * torch.exp(-torch.cat(list(self.thresholds))).sum()

    @torch.no_grad()
    def settle(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Reset exhausted layers, without waiting for the device."""
        del optimizer, step
        for i, (weight, threshold) in enumerate(zip(self.weights.values(), self.thresholds, strict=True)):
            limit = threshold.abs() if self.absolute else threshold
            mask = unit_step(weight.abs().sub_(by_row(limit, weight)))
            kept = row_sum(mask).sum(dtype=torch.float64) / mask.numel()
            exhausted = (kept <= self.reset_at) & (self.reset_at > 0)
            threshold.copy_(torch.where(exhausted, torch.zeros_like(threshold), threshold))
            self.forward_kept[i] = torch.where(exhausted, torch.ones_like(kept), kept)


def build(task: Task) -> Method:
    alpha = task.config.dst.alpha
    return build_masked(task, lambda weights: TrainableThresholds(weights, alpha, False))
