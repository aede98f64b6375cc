"""BatchNorm statistics, measured anew for a network whose structure has just been chosen.

Statistics gathered while masks changed describe no network that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_sparse.engine.forward import train_mode

Reduce = Callable[[Tensor], Tensor]
"""Combines a tensor over ranks; returns the result, which may be the tensor itself."""

Run = Callable[[nn.Module, Any], object]
"""Runs a network on a batch."""


def is_norm(module: nn.Module) -> bool:
    """Whether the vectors of ``module`` are the scale and the shift of a norm: its class calls itself one."""
    return "norm" in type(module).__name__.lower()


def reestimate_batch_norm(
    module: nn.Module,
    batches: Iterable[Any],
    reduce: Reduce | None = None,
    run: Run = nn.Module.__call__,
) -> None:
    """Replace the running statistics of every BatchNorm by their plain average over ``batches``, in place.

    Each batch weighs the same: running mean = (1/n) Σ_i mean_i and running variance = (1/n) Σ_i var_i, with
    the unbiased variance of each batch; one that makes a statistic NaN or infinite is left out, as a step of
    the training leaves it out. The module runs with its BatchNorms normalising by batch, and
    everything else (dropout) in evaluation mode. Momenta and training flags are put back. A BatchNorm that
    the module's own training mode holds fixed, or that no batch reaches, is left alone. ``run`` puts a batch
    through the network; ``reduce`` is the mean over ranks of a flat tensor, and every rank calls this, with
    any number of batches. Raises ValueError: no rank has a batch that counts."""
    with flags_restored(module):
        train_mode(module)
        norms = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.training
        ]
    if not norms:
        return
    given, buffers = 0, [buffer for norm in norms for buffer in norm.buffers()]
    with flags_restored(module), _cumulative(norms) as passes, torch.no_grad():
        module.eval()
        for norm in norms:
            norm.training = True
        for images in batches:
            before = [buffer.clone() for buffer in buffers], dict(passes)
            run(module, images)
            if all(torch.stack([buffer.isfinite().all() for buffer in buffers]).tolist()):
                given += 1
            else:
                torch._foreach_copy_(buffers, before[0])
                passes.update(before[1])
    if reduce is not None:
        device = next(buffer.device for buffer in norms[0].buffers())
        counts = torch.tensor([given, *passes.values()], dtype=torch.float32, device=device)
        mean = reduce(counts.clone())
        given = int(mean[0].ceil())
    if not given:
        raise ValueError(
            "BatchNorm statistics need at least one batch of finite values; give some to evaluation() or "
            "finalize()"
        )
    if reduce is not None:
        # 1 where every rank has as many; what no batch has reached stays the mean of what it was.
        shares = torch.where(mean > 0, counts / mean, 1)[1:]
        _reduce_statistics(norms, shares.tolist(), reduce)


@contextmanager
def flags_restored(module: nn.Module) -> Iterator[None]:
    """Put the training flags of all layers back at the end."""
    flags = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in flags:
            layer.training = training


@contextmanager
def _cumulative(norms: list[_BatchNorm]) -> Iterator[dict[_BatchNorm, int]]:
    """Start the running statistics afresh with the first pass, and keep their cumulative average: that which
    torch keeps without a momentum, for which it would wait for the number of passes that a device has
    counted. Yields that number."""
    momenta, passes = [norm.momentum for norm in norms], dict.fromkeys(norms, 0)

    def count(norm: _BatchNorm, _: object) -> None:
        if not passes[norm]:
            norm.reset_running_stats()
        passes[norm] += 1
        norm.momentum = 1.0 / passes[norm]

    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _reduce_statistics(norms: list[_BatchNorm], shares: list[float], reduce: Reduce) -> None:
    """Replace statistics by their mean over ranks; each weighs as much as its share of the passes."""
    own = [
        (tensor, share)
        for norm, share in zip(norms, shares, strict=True)
        for tensor in (norm.running_mean, norm.running_var)
        if tensor is not None
    ]
    given = [tensor * share if share else torch.zeros_like(tensor) for tensor, share in own]
    averaged = reduce(torch.cat(given)).split([len(tensor) for tensor in given])
    for (tensor, _), mean in zip(own, averaged, strict=True):
        tensor.copy_(mean)
