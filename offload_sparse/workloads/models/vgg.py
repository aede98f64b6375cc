"""VGG networks for small images (Simonyan & Zisserman 2015, with BatchNorm and one Linear classifier).

The sparse-training literature (Zhou et al. 2021 among it) keeps the convolutions of VGG-16 and VGG-19 and
replaces the three large Linear layers, meant for 224×224 images, with one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offload_sparse.workloads.models.construction import initialise, scaled


class VGG(nn.Module):
    """Stages of 3×3 convolutions with BatchNorm and ReLU, a 2×2 max pool after each, average pool, Linear.

    Args:
        stages: output channels of the convolutions of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: multiplier of all channel counts.
        hidden: units of a hidden layer in the classifier, 0 for none; with one the last stage is pooled by
            the average alone, as in Dynamic Sparse Training (Liu et al. 2020).

    Shape: float[N, in_channels, H, W] → float[N, num_classes]; H and W at least 2 to the power of the number
        of stages (with a hidden layer, less one).
    """

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


def vgg16_cifar(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """The 13 convolutions of VGG-16 and one Linear(512, classes); images of at least 32×32."""
    stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    return VGG(stages, num_classes, in_channels, width)


def vgg16_dst_cifar(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """VGG-16 as in Dynamic Sparse Training: 13 convolutions, Linear(512, 512), Linear(512, classes)."""
    stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    return VGG(stages, num_classes, in_channels, width, hidden=512)


def vgg19_cifar(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """The 16 convolutions of VGG-19 and one Linear(512, classes); images of at least 32×32."""
    stages = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
    return VGG(stages, num_classes, in_channels, width)


def vgg_small(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> VGG:
    """Six convolutions in three stages, for 28×28 images on a CPU; images of at least 8×8."""
    return VGG(((32, 32), (64, 64), (128, 128)), num_classes, in_channels, width)
