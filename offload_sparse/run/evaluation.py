"""Accuracy and loss of a module on a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload_sparse.engine.batch_norm import Reduce, flags_restored


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over ``count`` images of all ranks.

    Attributes:
        loss: mean cross entropy per image, in nats, without label smoothing.
        accuracy: share of the images whose largest logit is the label's.
        one_class: every image was taken for the same class, and not every one rightly."""

    loss: float
    accuracy: float
    count: int
    one_class: bool = False


def evaluate(
    module: nn.Module,
    loader: Iterable[tuple[Tensor, ...]],
    transform: Callable[[Tensor], Tensor],
    device: torch.device | str,
    reduce: Reduce | None = None,
) -> Evaluation:
    """Evaluate ``module``, float[b, C, H, W] → logits float[b, classes], in evaluation mode, without
    gradients; its training flags are put back. Raises ValueError: there was no image on any rank.

    Args:
        loader: batches of images and labels int64[b]; together the ranks' loaders give every image once.
        transform: applied to the images of each batch, such as ``Normalise``; its result is on ``device``.
        reduce: sum over ranks of float64[5]; ``None`` for one rank."""
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    with flags_restored(module), torch.inference_mode():
        module.eval()
        for images, labels, *_ in loader:
            sums += _sums(module(transform(images)), labels.to(device, non_blocking=True))
    loss, correct, count, chosen, squares = (reduce(sums) if reduce else sums).tolist()
    if count == 0:
        raise ValueError(
            "there are no images to evaluate on; choose other data.splits or raise data.limit"
        )
    one_class = squares * count == chosen * chosen and correct < count  # exact: sums of small integers
    return Evaluation(loss / count, correct / count, round(count), one_class)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """float64[5]: summed cross entropy, correct predictions, images, predicted classes and their squares."""
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    predicted = logits.argmax(dim=1)
    images, correct = predicted.new_full((), len(labels)), (predicted == labels).sum()
    counts = [correct, images, predicted.sum(), predicted.square().sum()]
    return torch.stack([loss, *(count.double() for count in counts)])
