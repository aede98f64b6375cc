"""From uint8 images to normalised floats, on the device that trains on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.images import ImageSet

_MEASURED_IMAGES = 10_000
_CHUNK = 256


class Normalise(nn.Module):
    """(x / 255 - mean) / std per channel: uint8[N, C, H, W] on any device → ``dtype``[N, C, H, W] on the
    device of the module; both are of images in [0, 1]. With ``channels_last`` these come last in memory, and
    what convolutions make of them stays so, which is what they are fastest with on every device."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        if any(not value > 0 for value in std):
            raise ValueError(f"data.std is {list(std)}; give values above 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # The bytes travel, not the floats: a quarter of the traffic to the device.
        images = images.to(self.mean.device, non_blocking=True)
        images = images.to(self.mean.dtype, memory_format=self._layout)
        return images.div(255).sub_(self.mean).div_(self.std)


class _KeptLast(TorchFunctionMode):
    """Convolutions on the meta device leave channels last, as those on every other device do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.contiguous(memory_format=torch.channels_last) if func is torch.conv2d else result


def takes_channels_last(network: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether ``network``, on the meta device, computes from images [C, H, W] whose channels come last in
    memory, in its present modes and in evaluation. One that views its features as if they came first does
    not."""
    network = copy.deepcopy(network)
    images = torch.empty(2, *image_shape, device="meta").contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), _KeptLast():
            network(images)
            network.eval()(images)
    except Exception:  # whatever it is that this network cannot do with them
        return False
    return True


def normalise_for(
    images: ImageSet, config: DataConfig, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Normalise:
    """The normalisation of a run: ``data.mean`` and ``data.std``, each measured on ``images`` where it is
    empty.

    One given value serves every channel. Raises ValueError: a list has neither one value nor one per channel,
    or a deviation is not above 0."""
    mean, std = list(config.mean), list(config.std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, images.channels):
            raise ValueError(
                f"data.{name} has {len(values)} values, but the images have {images.channels} "
                "channel(s); give one value, one per channel, or none to measure it"
            )
    if not (mean and std):
        measured_mean, measured_std = measure(images)
        mean, std = mean or measured_mean, std or measured_std
    repeat = images.channels
    return Normalise(mean * (repeat // len(mean)), std * (repeat // len(std)), dtype, channels_last)


def measure(images: ImageSet, limit: int = _MEASURED_IMAGES) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], over all pixels of at most ``limit`` evenly spaced
    images.

    The deviation of a channel without any contrast is given as 1, so that dividing by it does no harm."""
    chosen = torch.linspace(0, len(images) - 1, min(limit, len(images)), dtype=torch.float64).round().long()
    total = torch.zeros(images.channels, dtype=torch.int64)
    squares = torch.zeros(images.channels, dtype=torch.int64)
    for part in chosen.split(_CHUNK):
        pixels = images.gather(part).to(torch.int64)
        total += pixels.sum(dim=(0, 2, 3))
        squares += pixels.square().sum(dim=(0, 2, 3))
    count = len(chosen) * images.height * images.width
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 0, std, torch.full_like(std, 255.0))
    return (mean / 255).tolist(), (std / 255).tolist()
