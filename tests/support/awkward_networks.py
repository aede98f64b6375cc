"""Networks that keep something where ``state_dict`` does not look, or that are built in unusual ways."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Two layers; images float[N, 3, 16, 16] to logits float[N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.fc = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b1(self.c1(x))).mean((2, 3)))


class MeanBuffer(Plain):
    """A buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


class IndexBuffer(Plain):
    """An integer buffer of positions that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(3)[:, :, :, self.order])


class Rotary(Plain):
    """Frequencies, and tables computed from them, as rotary embeddings keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1.0 / 100 ** torch.linspace(0, 1, 16), persistent=False)
        angles = torch.outer(torch.arange(16.0), self.frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.cosine)


class RandomAttribute(Plain):
    """A random tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class ListOfTensors(Plain):
    """Tensors in a list, which neither parameters nor buffers know."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = [torch.tensor(0.25), torch.tensor(0.5)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shifts[0] * self.shifts[1])


class Rates(Plain):
    """A constructor that reads the values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [r.item() for r in torch.linspace(0.5, 1, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.rates[1])


class RandomNumber(Plain):
    """A constructor that draws a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1 + torch.rand(()).item()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


class NumpyRates(Plain):
    """A constructor that hands tensors to NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.linspace(0.5, 1, 4).numpy().tolist()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.rates[1])


class Frozen(Plain):
    """A layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.c1.requires_grad_(False)


class Residual(Plain):
    """A sum, whose operands ``filter`` narrows differently."""

    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b1(self.c1(x)))
        return self.fc(F.relu(x + self.c2(x)).mean((2, 3)))


class SharedTable(Plain):
    """A buffer that two modules hold, as all blocks of a network may hold one mask."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.linspace(0.5, 1, 16)
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.blocks:
            block.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.blocks[0].table * self.blocks[1].table)


class Exact(Plain):
    """A buffer of more bits than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert self.seen.dtype == torch.float64
        if self.training:
            self.seen = self.seen + 2.0**-40 + len(x)
        return super().forward(x * (1 + self.seen).log().to(x.dtype))


class Aliases(Plain):
    """A parameter and a buffer that are in a list and in a mapping as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.first, self.means = [self.c1.weight], {"images": self.mean}

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x - self.means["images"], self.first[0], self.c1.bias)
        return self.fc(F.relu(self.b1(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM, which keeps its parameters in a list, behind channels that can be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.rnn = nn.Conv2d(3, 16, 3), nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.hidden, self.fc = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(F.relu(self.c1(x)).mean(3).transpose(1, 2))
        return self.fc(F.relu(self.hidden(states[:, -1])))


class Dictionary(Plain):
    """Its output is a mapping."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "more": (logits * 2, "text")}


ALL = (
    MeanBuffer,
    IndexBuffer,
    Rotary,
    RandomAttribute,
    ListOfTensors,
    Rates,
    RandomNumber,
    NumpyRates,
    Frozen,
    Residual,
    SharedTable,
    Exact,
    Aliases,
    Recurrent,
    Dictionary,
)


def computed_of_a_pickle(_: list[str]) -> None:
    """In a process of its own: ``logits.pt`` of what lies beside it."""
    networks = torch.load("networks.pt", weights_only=False)
    torch.save([network(torch.load("images.pt")) for network in networks], "logits.pt")
