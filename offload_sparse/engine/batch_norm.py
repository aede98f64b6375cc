"""BatchNorm statistics of a network whose structure has just been chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batch_norm(
    module: nn.Module, batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Replace the running statistics by the equally weighted mean of the batch statistics over ``batches``.

    Statistics gathered while masks changed describe no network that exists, so they are measured anew for the final one.
    Dropout and the like stay in evaluation mode; flags and momenta are restored.

    Args:
        module: the network; only its BatchNorm buffers change.
        batches: network inputs, at least one.
        reduce: mean over ranks, applied to the statistics.

    Raises:
        ValueError: there are no batches.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes = [(m, m.training) for m in module.modules()]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # torch's notation for the cumulative average
    try:
        count = sum(1 for batch in batches if module(batch) is not None)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for m, training in modes:
            m.training = training
    if not count:
        raise ValueError("BatchNorm statistics need at least one batch; check final.bn_batches and the training split")
    if reduce is not None:
        for layer in layers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(reduce(layer.running_mean.clone()))
            layer.running_var.copy_(reduce(layer.running_var.clone()))
