"""A wide residual network of linear layers: most weights for the least arithmetic.

    images ─ flatten ─ Linear ─┬───────────────────────────────── + ─ … ─ BN ─ Linear ─ logits
                               └ BN ─ Linear ─ BN ─ ReLU ─ Linear ┘

An image passes each weight once, so a network of 10 billion weights costs 20 GFLOPs per image: what a store
larger than memory is shown with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload_sparse.workloads.models.construction import scaled


class MLPBlock(nn.Module):
    """BN-Linear-BN-ReLU-Linear, added to the stream."""

    def __init__(self, stream: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(stream)
        self.expand = nn.Linear(stream, hidden, bias=False)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.contract = nn.Linear(hidden, stream, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.relu(self.norm2(self.expand(self.norm1(x)))))


class MLP(nn.Module):
    """A linear layer into a stream of ``stream`` channels, ``depth`` residual blocks of two linear layers
    with ``hidden`` channels between, a linear classifier; ``width`` multiplies both channel counts.

    Weights start as ``nn.Linear`` draws them (each value once), the classifier near zero. float[N,
    in_channels, image_size, image_size] → float[N, num_classes]."""

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        stream: int = 512,
        hidden: int = 2048,
        depth: int = 4,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}; give at least 1 block")
        channels = scaled(stream, width)
        self.embed = nn.Linear(in_channels * image_size**2, channels)
        self.blocks = nn.Sequential(*(MLPBlock(channels, scaled(hidden, width)) for _ in range(depth)))
        self.norm = nn.BatchNorm1d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.embed(torch.flatten(images, 1)))))
