"""Dynamic Forward and Backward Sparse Training: DST with |t|, and a second trained mask on the gradients.

Pote, Ganaie, Hassan & Khare (2023):

    M_f = U(|θ| - |t_f|)                        forward mask, section 3.2
    CS  = G / Σ_row |G|                         contribution scores, section 3.3.1
    M_b = U(|CS| - |t_b|)                       backward mask, section 3.3.2
    loss + α Σ exp(-t_f) + β std(G ⊙ M_b)       sections 3.2, 3.4 and 3.5

What the text leaves open, and what is done here:

* G is the gradient of the loss with respect to the dense weights, with the path through the surrogate,
  averaged over ranks; a row without any gradient has CS = 0.
* G is a constant in the penalty, which therefore trains t_b alone and needs no second backward pass.
* The standard deviation is that of all masked gradients of all layers as one vector (torch's, with n - 1).
* t_f and t_b start at 0, where |t| is given the derivative 1: with 0, t_b could never move.
* Thresholds have the optimizer of the weights and no weight decay. Momentum and weight decay go on moving
  weights whose gradient is masked.
* As in DST, a layer of which at most 1 % is left gets its t_f back to 0. t_b is never reset.
* The gradient mask is chosen from the whole gradient, so the product that computes it stays dense: the sparse
  backward pass of the paper's counts is what the update uses, not what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks.dst import TrainableThresholds
from offload_sparse.methods.weight_masks.masked import build_masked
from offload_sparse.methods.weight_masks.sparsity import along, row_sum, step_slope, unit_step


class ForwardBackwardThresholds(TrainableThresholds):
    """Both masks of DFBST; ``alpha`` is the factor of L_s, ``beta`` that of L_v."""

    def __init__(self, weights: Mapping[str, nn.Parameter], alpha: float, beta: float) -> None:
        super().__init__(weights, alpha, True)
        self.beta = beta
        # What requires a gradient has a part in the forward pass; DistributedDataParallel insists on it.
        self.own = nn.ParameterList(
            nn.Parameter(torch.zeros_like(threshold), requires_grad=False) for threshold in self.thresholds
        )

    @torch.no_grad()
    def amend_gradients(self, step: int, optimizer: torch.optim.Optimizer) -> bool:  # noqa: ARG002
        gradients = [_gradient(weight) for weight in self.weights.values()]
        slopes, kept = mask_gradients(gradients, list(self.own))
        for threshold, slope in zip(self.own, slopes, strict=True):
            threshold.grad = slope.mul_(self.beta)
        self.backward_kept.copy_(kept)
        return True


def mask_gradients(gradients: Sequence[Tensor], thresholds: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Apply the backward masks in place, and differentiate L_v = std(G ⊙ M_b) with respect to t_b.

    With G constant, dL_v/dG̃ = (G̃ - mean) / ((n - 1) L_v) and dG̃/dt_b = -G U'(|CS| - |t_b|) sign(t_b).
    Returns dL_v/dt_b of every layer (zero where L_v is), and float64[layers], the share of entries kept.

    Args:
        gradients: G of every layer, float[rows, ...]; G ⊙ M_b afterwards.
        thresholds: t_b of every layer, float[rows]."""
    slopes, kept = [], []
    for gradient, threshold in zip(gradients, thresholds, strict=True):
        size = gradient.abs()
        total = row_sum(size).clamp_min_(torch.finfo(size.dtype).tiny)
        distance = size.div_(along(total, gradient)).sub_(along(threshold.abs(), gradient))
        mask = unit_step(distance)
        slopes.append(step_slope(distance).mul_(gradient))
        gradient.mul_(mask)
        kept.append(row_sum(mask).sum(dtype=torch.float64) / mask.numel())
    count = sum(gradient.numel() for gradient in gradients)
    mean = torch.stack([gradient.sum() for gradient in gradients]).sum() / count
    centred = [gradient - mean for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(values) for values in centred])
    deviation = torch.linalg.vector_norm(norms) / math.sqrt(max(1, count - 1))
    scale = torch.where(deviation > 0, 1 / (max(1, count - 1) * deviation), torch.zeros_like(deviation))
    results = []
    for values, slope, threshold in zip(centred, slopes, thresholds, strict=True):
        toward = row_sum(slope.mul_(values)).mul_(scale)
        results.append(torch.where(threshold >= 0, -toward, toward))
    return results, torch.stack(kept)


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None, "a masked layer took no part in the loss"
    return weight.grad


def build(task: Task) -> Method:
    alpha, beta = task.config.dst.alpha, task.config.dfbst.beta
    return build_masked(task, lambda weights: ForwardBackwardThresholds(weights, alpha, beta))
