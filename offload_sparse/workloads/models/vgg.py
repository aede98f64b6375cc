"""VGG networks for small images (Simonyan & Zisserman 2015, with BatchNorm and one Linear classifier).

The sparse-training literature (Zhou et al. 2021 among it) keeps the convolutions of VGG-16 and VGG-19 and
replaces the three large Linear layers, meant for 224×224 images, with one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offload_sparse.workloads.models.construction import initialise, scaled

_FIRST = ((64, 64), (128, 128))
VGG16 = (*_FIRST, (256,) * 3, (512,) * 3, (512,) * 3)
VGG19 = (*_FIRST, (256,) * 4, (512,) * 4, (512,) * 4)
SMALL = ((32, 32), (64, 64), (128, 128))
"""Six convolutions, for 28×28 images on a CPU."""


class VGG(nn.Module):
    """Stages of 3×3 convolutions with BatchNorm and ReLU, a 2×2 max pool after each, average pool, Linear.

    Args:
        stages: output channels of the convolutions of each stage, multiplied by ``width``.
        hidden: units of a hidden layer in the classifier, 0 for none; with one the last stage is pooled by
            the average alone, as in Dynamic Sparse Training (Liu et al. 2020)."""

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for base in stage:
                layers += _convolution(channels, scaled(base, width))
                channels = scaled(base, width)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*(layers[:-1] if hidden else layers))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = _classifier(channels, scaled(hidden, width) if hidden else 0, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _classifier(inputs: int, hidden: int, outputs: int) -> nn.Module:
    if not hidden:
        return nn.Linear(inputs, outputs)
    first = (nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
    return nn.Sequential(*first, nn.Linear(hidden, outputs))
