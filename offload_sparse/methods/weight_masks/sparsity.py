"""Masks over the single weights of any network: what DST, DFBST and RigL have in common.

    MaskedNetwork
      network      the user's model, untouched; owns the dense weights, biases and norms
      sparsity     forward masks, thresholds; hands the network its masked weights for one forward pass

The weight of every ``Linear`` and ``Conv2d`` is a matrix with one row per output (a filter is flattened), and
each row has its own threshold. Biases and norms are never masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def maskable_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all ``Linear`` and ``Conv2d`` layers by qualified name; a shared one under its first.
    Raises ValueError: there is none."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            assert isinstance(layer.weight, nn.Parameter)
            found[f"{name}.weight" if name else "weight"] = layer.weight
    if not found:
        raise ValueError(
            f"a {type(network).__name__} has no Linear or Conv2d layer to mask; choose another method"
        )
    return found


def along(values: Tensor, weight: Tensor, dim: int = 0) -> Tensor:
    """``values`` of the positions of a dimension, in the shape that broadcasts against ``weight``."""
    return values.view([-1 if d == dim else 1 for d in range(weight.dim())])


def row_sum(values: Tensor) -> Tensor:
    """Sum of [rows, ...] over everything but the rows."""
    return values.sum(dim=tuple(range(1, values.dim())))


def step_slope(distance: Tensor) -> Tensor:
    """The derivative that stands in for that of the unit step (Xu & Cheung 2019; equation of section 3.3.2 of
    Pote et al. 2023): 2 - 4|x| up to 0.4, 0.4 up to 1, then 0. Overwrites ``distance`` on the way."""
    size = distance.abs_()
    inside = torch.le(size, 1.0, out=torch.empty_like(size))
    return torch.rsub(size, 2.0, alpha=4).clamp_min_(0.4).mul_(inside)


def unit_step(distance: Tensor) -> Tensor:
    """U(x) = 1 for x ≥ 0, else 0, in the type of ``distance``: products with booleans copy them first."""
    return torch.ge(distance, 0.0, out=torch.empty_like(distance))


class MaskedWeight(torch.autograd.Function):
    """w ⊙ U(|w| - t) per row, U(x) = 1 for x ≥ 0, with ``step_slope`` for the derivative of U.

    Inputs: weight float[rows, ...], threshold float[rows]. The gradient reaches both: a masked weight still
    learns through the surrogate."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        distance = weight.abs().sub_(along(threshold, weight))
        mask = unit_step(distance)
        ctx.save_for_backward(weight, distance, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # With D = U': d/dw = g U + g |w| D and d/dt = -Σ g w D.
        weight, distance, mask = ctx.saved_tensors
        (grad,) = grads
        through_step = step_slope(distance.clone()).mul_(grad)
        to_threshold = row_sum(through_step * weight).neg_()
        return through_step.mul_(weight.abs()).addcmul_(grad, mask), to_threshold


def absolute_threshold(threshold: Tensor) -> Tensor:
    """|t|, with the derivative 1 at t = 0.

    A threshold that starts at zero could never leave it with the derivative 0 that torch gives |t| there."""
    return torch.where(threshold >= 0, threshold, -threshold)


class Sparsity(nn.Module, ABC):
    """Decides which weights of a network take part in a step.

    Its parameters (thresholds) are trained with the network's; those without a part in the forward pass
    require no gradient, and ``amend_gradients`` writes theirs.

    Attributes:
        forward_kept: float64[layers], share of each layer's weights that the forward pass used last.
        backward_kept: float64[layers], share of the entries of each layer's gradient that was kept last."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        # A plain dict: the parameters belong to the network. No tensor here is a buffer, since a module's
        # buffers change their type with it, and DistributedDataParallel sends them around before each step.
        self.weights = dict(weights)
        device = next(iter(self.weights.values())).device
        self.forward_kept = torch.ones(len(self.weights), dtype=torch.float64, device=device)
        self.backward_kept = self.forward_kept.clone()

    @abstractmethod
    def masked(self) -> dict[str, Tensor]:
        """The weights that a forward pass uses instead of the network's own, with their graph."""

    def masks(self) -> dict[str, Tensor]:
        """bool, shaped as the weights: what the forward pass keeps now, where single weights are masked."""
        return {}

    def penalty(self) -> Tensor | None:
        """A term of the loss."""
        return None

    def amend_gradients(self, step: int, optimizer: torch.optim.Optimizer) -> bool:  # noqa: ARG002
        """Change the gradients of the network (already averaged over ranks) before the optimizer sees them.
        Returns whether the optimizer takes its step."""
        return True

    def settle(self) -> None:
        """After the step: bring masks and weights in line, and note the remaining ratios."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training needs beside the parameters, by name; written to when a run resumes."""
        return {"forward_kept": self.forward_kept, "backward_kept": self.backward_kept}

    def input_gradient_used(self) -> Tensor:
        """float64[layers]: share of each layer's weights that the gradient of its input is computed with."""
        return self.forward_kept

    def weight_gradient_used(self) -> Tensor:
        """float64[layers]: share of each layer's weight gradient that has to be computed, beside what is kept
        of it. 1 where the choice needs all of it."""
        return torch.ones_like(self.forward_kept)


class MaskedNetwork(nn.Module):
    """A network that is called with masked weights; its code and names stay as they are."""

    def __init__(self, network: nn.Module, sparsity: Sparsity) -> None:
        super().__init__()
        self.network = network
        self.sparsity = sparsity

    def forward(self, *inputs: Tensor) -> Any:
        return functional_call(self.network, self.sparsity.masked(), inputs)
