"""Residual networks for small images: ResNet-20/32 (He et al. 2016, section 4.2) and Wide ResNet.

Both have three stages of residual blocks at full, half and quarter resolution. Where a stage changes the
number of channels the shortcut is a 1×1 convolution: Zhou et al. 2021 give every filter a mask, and one that
pads with zeros has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload_sparse.workloads.models.construction import initialise, scaled


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, added to the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, added to the shortcut; a 1×1 shortcut reads the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + shortcut


def _stages(
    block: type[BasicBlock] | type[PreActivationBlock], inputs: int, widths: tuple[int, ...], blocks: int
) -> nn.Sequential:
    stages: list[nn.Module] = []
    for number, outputs in enumerate(widths):
        stride = 1 if number == 0 else 2
        first = block(inputs, outputs, stride)
        stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(blocks - 1))))
        inputs = outputs
    return nn.Sequential(*stages)


class ResNet(nn.Module):
    """A 3×3 convolution of stride 1 without max pool, stages of ``blocks`` basic blocks with ``widths``
    channels times ``width``, and a classifier. Of three stages of 16, 32 and 64 channels it is the ResNet of
    depth 6·blocks + 2."""

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        channels = tuple(scaled(base, width) for base in widths)
        self.conv1 = _conv3x3(in_channels, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.stages = _stages(BasicBlock, channels[0], channels, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.stages(F.relu(self.bn1(self.conv1(images))))
        return self.fc(torch.flatten(self.pool(out), 1))


class WideResNet(nn.Module):
    """Pre-activation Wide ResNet of depth 6·blocks + 4 whose stages are ``factor`` times as wide as those of
    ResNet; ``width`` multiplies the channels of every layer, the first convolution's 16 included."""

    def __init__(
        self, blocks: int, factor: int, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        stem = scaled(16, width)
        widths = tuple(scaled(base * factor, width) for base in (16, 32, 64))
        self.conv1 = _conv3x3(in_channels, stem)
        self.stages = _stages(PreActivationBlock, stem, widths, blocks)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn(self.stages(self.conv1(images))))
        return self.fc(torch.flatten(self.pool(out), 1))
