"""Small residual networks, for tests of the policy that masks every filter by itself."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """BN - ReLU - conv - BN - ReLU - conv, added to its input in place; the norm reads the bare stream."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.norm1(x).relu())
        out = self.conv2(self.norm2(out).relu())
        out += x
        return out


class ResidualNet(nn.Module):
    """stem - two blocks - BN - ReLU - pool - flatten - linear; one stream, joined by two additions."""

    def __init__(self, width: int = 5, hidden: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, hidden), Block(width, hidden))
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(self.blocks(self.stem(x))).relu()).flatten(1))
