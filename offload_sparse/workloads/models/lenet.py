"""The two LeNets of the pruning literature: LeNet-300-100 (LeCun et al. 1998) and LeNet-5 as Caffe ships it.

Both keep torch's own initial weights (uniform in ±1/sqrt(fan-in)), as Liu et al. (2020) do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload_sparse.workloads.models.construction import scaled


class LeNet300(nn.Module):
    """Two hidden layers of 300 and 100 units with ReLU: 266,610 parameters for 28×28 grey images.

    Shape: float[N, in_channels, 28, 28] → float[N, num_classes].
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        self.fc1 = nn.Linear(in_channels * 28 * 28, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(torch.flatten(images, 1)))
        return self.fc3(F.relu(self.fc2(hidden)))


class LeNet5(nn.Module):
    """Convolutions of 20 and 50 filters of 5×5, each followed by a 2×2 max pool, then 500 hidden units:
    431,080 parameters for 28×28 grey images.

    Shape: float[N, in_channels, 28, 28] → float[N, num_classes].
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(20, width), scaled(50, width)
        hidden = scaled(500, width)
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(16 * second, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # ReLU after the pool gives the same values as before it, on a quarter of the entries.
        out = F.relu(F.max_pool2d(self.conv1(images), 2))
        out = F.relu(F.max_pool2d(self.conv2(out), 2))
        return self.fc2(F.relu(self.fc1(torch.flatten(out, 1))))
