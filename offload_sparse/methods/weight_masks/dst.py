"""Dynamic Sparse Training: weights masked by trainable thresholds, one per output row.

Liu, Xu, Shi, Cheung & So, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable
Masked Layers" (ICLR 2020):

    M = U(|θ| - t)      loss + α Σ exp(-t)      U' ≈ 2 - 4|x|, 0.4, 0

What the text leaves open, and what is done here: thresholds start at 0; a layer of which at most 1 % is left
gets its thresholds back to 0, so that for some hundred steps most of it is there again; thresholds have the
optimizer of the weights (with its momentum) and no weight decay; the last layer is masked as the others are;
U(0) = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks.masked import build_masked
from offload_sparse.methods.weight_masks.sparsity import MaskedWeight, Sparsity, absolute_threshold, along

RESET_AT = 0.01
"""Remaining share of a layer at which its thresholds start anew."""


class TrainableThresholds(Sparsity):
    """Forward masks 1[|θ| ≥ t] (DST) or, ``absolute``, 1[|θ| ≥ |t|] (DFBST); ``alpha`` is the factor of the
    penalty Σ exp(-t)."""

    def __init__(self, weights: Mapping[str, nn.Parameter], alpha: float, absolute: bool) -> None:
        super().__init__(weights)
        self.alpha, self.absolute = alpha, absolute
        self.thresholds = nn.ParameterList(
            torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            for weight in self.weights.values()
        )

    def masked(self) -> dict[str, Tensor]:
        return {name: MaskedWeight.apply(weight, limit) for name, weight, limit in self._limits()}

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        return {name: weight.abs() >= along(limit, weight) for name, weight, limit in self._limits()}

    def _limits(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Every weight, and what its entries have to reach."""
        for (name, weight), threshold in zip(self.weights.items(), self.thresholds, strict=True):
            yield name, weight, absolute_threshold(threshold) if self.absolute else threshold

    def penalty(self) -> Tensor:
        """α · L_s = α Σ_layers Σ_rows exp(-t)."""
        return self.alpha * torch.exp(-torch.cat(list(self.thresholds))).sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Reset exhausted layers, without waiting for the device."""
        for i, (mask, threshold) in enumerate(zip(self.masks().values(), self.thresholds, strict=True)):
            kept = mask.count_nonzero().double() / mask.numel()
            exhausted = kept <= RESET_AT
            threshold.masked_fill_(exhausted, 0.0)
            self.forward_kept[i] = kept.masked_fill(exhausted, 1.0)


def build(task: Task) -> Method:
    alpha = task.config.dst.alpha
    return build_masked(task, lambda weights: TrainableThresholds(weights, alpha, False))
