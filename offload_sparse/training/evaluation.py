"""Accuracy and loss of a module on a loader, and BatchNorm statistics measured anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Reduce = Callable[[Tensor], Tensor]
"""Combines a tensor over ranks; returns the result, which may be the tensor itself."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over a loader.

    Attributes:
        loss: mean cross entropy per image, in nats, without label smoothing.
        accuracy: share of the images whose largest logit is the label's.
        count: images seen over all ranks.
    """

    loss: float
    accuracy: float
    count: int


def evaluate(
    module: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    transform: Callable[[Tensor], Tensor],
    device: torch.device | str,
    reduce: Reduce | None = None,
) -> Evaluation:
    """Evaluate ``module`` in evaluation mode, without gradients; its training flags are put back.

    Args:
        module: float[b, C, H, W] → logits float[b, classes].
        loader: batches of images and labels int64[b]; together the ranks' loaders give every image once.
        transform: applied to the images of each batch, such as ``Normalise``; its result is on ``device``.
        device: where module and sums live.
        reduce: sum over ranks of float64[3]; ``None`` for one rank.

    Raises:
        ValueError: there was no image on any rank.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with _flags_restored(module), torch.inference_mode():
        module.eval()
        for images, labels in loader:
            sums += _sums(module(transform(images)), labels.to(device, non_blocking=True))
    loss, correct, count = (reduce(sums) if reduce else sums).tolist()
    if count == 0:
        raise ValueError(
            "there are no images to evaluate on; choose another data.test_split or raise data.test_limit"
        )
    return Evaluation(loss / count, correct / count, round(count))


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """float64[3]: summed cross entropy, correct predictions, images."""
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct.double(), torch.full_like(loss, len(labels))])


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Tensor], reduce: Reduce | None = None) -> None:
    """Replace the running statistics of every BatchNorm by their plain average over ``batches``, in place.

    Each batch weighs the same: running mean = (1/n) Σ_i mean_i and running variance = (1/n) Σ_i var_i, with
    the unbiased variance of each batch. The module runs with its BatchNorms normalising by batch, and
    everything else (dropout) in evaluation mode. Momenta and training flags are put back. A module without
    running statistics is left alone.

    Args:
        module: the network; its running statistics may be views of a larger buffer.
        batches: inputs of the module, such as normalised training images float[b, C, H, W].
        reduce: mean over ranks of a flat tensor; every rank must give the same number of batches. ``None``
            for one rank.

    Raises:
        ValueError: there are no batches.
    """
    norms = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    if not norms:
        return
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("BatchNorm statistics need at least one batch; raise final.bn_batches")
    with _flags_restored(module), _cumulative(norms), torch.no_grad():
        module.eval()
        for norm in norms:
            norm.training = True
        for images in chain([first], iterator):
            module(images)
    if reduce is not None:
        _reduce_statistics(norms, reduce)


@contextmanager
def _flags_restored(module: nn.Module) -> Iterator[None]:
    flags = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in flags:
            layer.training = training


@contextmanager
def _cumulative(norms: list[_BatchNorm]) -> Iterator[None]:
    """Start the running statistics afresh; without a momentum torch keeps their cumulative average."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _reduce_statistics(norms: list[_BatchNorm], reduce: Reduce) -> None:
    statistics = [
        tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None
    ]
    averaged = reduce(torch.cat(statistics))
    for tensor, mean in zip(statistics, averaged.split([len(tensor) for tensor in statistics]), strict=True):
        tensor.copy_(mean)
