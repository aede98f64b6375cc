"""RigL: a fixed number of weights per layer; the smallest are dropped, those of largest gradient grown.

Evci, Gale, Menick, Castro & Elsen, "Rigging the Lottery: Making All Tickets Winners" (ICML 2020). Every
``INTERVAL`` steps, until ``STOP`` of the run, each layer replaces f(step) of its weights, where

    f(step) = FRACTION / 2 · (1 + cos(π step / (STOP · total_steps)))

In such a step the gradient of all weights chooses, and no weight is trained (Algorithm 1). One that was just
dropped may be grown at once, and stays as it was; other grown weights and their momentum start at 0.
Densities of layers by ERK (Erdős-Rényi-Kernel): proportional to the sum of a layer's dimensions over their
product, at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks.masked import build_masked
from offload_sparse.methods.weight_masks.sparsity import Sparsity
from offload_sparse.policy.samplers import mask_generator

INTERVAL, FRACTION, STOP = 100, 0.3, 0.75


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdős-Rényi-Kernel densities: ε Σ dims / Π dims per layer, at most 1, that keep ``density`` of all
    weights.

    Layers that would pass 1 stay dense, and the others share what is left."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in free)
        beyond = {i for i in free if epsilon * raw[i] > 1}
        if not beyond:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= beyond
    return [1.0] * len(shapes)


def update_fraction(step: int, fraction: float, end: float) -> float:
    """Share of a layer's weights that is replaced at ``step``: a cosine from ``fraction`` to 0 at ``end``."""
    return fraction / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1.0, end))))


class DropAndGrow(Sparsity):
    """RigL's masks over ``weights`` (by name). The network's own weights are zero wherever they are masked,
    so it is called as it is."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        density: float,
        total_steps: int,
        seed: int,
    ) -> None:
        super().__init__(weights)
        self._end = STOP * total_steps
        shares = erk_densities([tuple(weight.shape) for weight in self.weights.values()], density)
        self._masks: list[Tensor] = []
        self._kept: list[int] = []
        for i, (weight, share) in enumerate(zip(self.weights.values(), shares, strict=True)):
            kept = max(1, round(share * weight.numel()))
            self._kept.append(kept)
            order = torch.randperm(weight.numel(), generator=mask_generator(seed, i))
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[order[:kept]] = True
            self._masks.append(mask.view(weight.shape).to(weight.device))
            with torch.no_grad():
                weight.mul_(self._masks[i])
            self.forward_kept[i] = self.backward_kept[i] = kept / weight.numel()

    def masked(self) -> dict[str, Tensor]:
        return {}

    def masks(self) -> dict[str, Tensor]:
        return {name: self._masks[i].clone() for i, name in enumerate(self.weights)}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"mask.{i}": mask for i, mask in enumerate(self._masks)}

    @torch.no_grad()
    def amend_gradients(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        replaces = 0 < step < self._end and step % INTERVAL == 0
        fraction = update_fraction(step, FRACTION, self._end)
        for mask, weight, kept in zip(self._masks, self.weights.values(), self._kept, strict=True):
            assert weight.grad is not None, "a masked layer took no part in the loss"
            if replaces:
                _replace(mask, weight, weight.grad, int(fraction * kept))
                for slot in optimizer.state[weight].values():  # nothing of a dropped weight is left there
                    if slot.shape == weight.shape:
                        slot.mul_(mask)
            weight.grad.mul_(mask)
        return not replaces

    def weight_gradient_used(self) -> Tensor:
        return self.forward_kept + (1 - self.forward_kept) / INTERVAL  # one dense product in so many steps


def _replace(mask: Tensor, weight: Tensor, gradient: Tensor, count: int) -> None:
    """Drop the ``count`` smallest weights of a layer and grow as many, where the gradient is largest among
    all but those that stay; ``mask`` and ``weight`` are changed in place."""
    size = weight.abs().masked_fill(~mask, torch.inf).flatten()
    flat = mask.view(-1)
    flat.index_fill_(0, size.topk(count, largest=False).indices, False)
    flat.index_fill_(0, gradient.abs().flatten().masked_fill(flat, -1.0).topk(count).indices, True)
    weight.mul_(mask)  # what was masked before is zero already


def build(task: Task) -> Method:
    seed, density = task.config.train.seed, task.config.policy.rho
    return build_masked(task, lambda weights: DropAndGrow(weights, density, task.total_steps, seed))
