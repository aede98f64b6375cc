"""Decoded images: one uint8 tensor where a split fits in memory, else decoded on access."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from offload_sparse.config import DataConfig
from offload_sparse.data.source import Split

_PIL_MODES = {1: "L", 3: "RGB"}
_BAR_DELAY_SECONDS = 5.0
_CHUNK = 256


class ImageSet:
    """The images and labels of one split, by index.

    A split that takes no more than ``data.cache_bytes`` when decoded is decoded here, once; others are
    decoded by ``gather`` each time.

    Args:
        split: what to decode.
        config: ``image_size`` and ``cache_bytes`` are read from it.
        channels: channels that ``gather`` returns, 3 repeats grey images; ``None`` takes those of the images.
        progress: draw a progress bar while decoding if that takes longer than 5 seconds.

    Attributes:
        channels: channels of the images that ``gather`` returns.
        height: their height in pixels.
        width: their width in pixels.
        labels: int64[N].
        cached: whether the split is held decoded.

    Raises:
        ValueError: the images differ in size and ``data.image_size`` is 0, an image cannot be decoded, or
            ``channels`` cannot be had.
    """

    def __init__(
        self, split: Split, config: DataConfig, channels: int | None = None, progress: bool = False
    ) -> None:
        self.channels = split.channels if channels is None else channels
        if self.channels not in (split.channels, 3):
            raise ValueError(
                f"a network of {self.channels} channel(s) cannot read RGB images; build it with 3 channels"
            )
        self.labels = split.labels
        self._split = split
        self._image_size = config.image_size
        self.height, self.width = split.image_shape(config.image_size)
        decoded_bytes = len(split) * split.channels * self.height * self.width
        self.cached = decoded_bytes <= config.cache_bytes
        self._pixels = self._decode_all(progress) if self.cached else None

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` int64[b], as uint8[b, channels, height, width]."""
        images = self._decode(indices.tolist()) if self._pixels is None else self._pixels[indices]
        return images.expand(-1, self.channels, -1, -1)

    def _decode_all(self, progress: bool) -> Tensor:
        pixels = torch.empty(len(self), self._split.channels, self.height, self.width, dtype=torch.uint8)
        name = f"decoding {self._split.name}"
        with tqdm(
            total=len(self), desc=name, delay=_BAR_DELAY_SECONDS, disable=not progress, leave=False
        ) as bar:
            for start in range(0, len(self), _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(self)))
                pixels[start : chunk.stop] = self._decode(chunk)
                bar.update(len(chunk))
        return pixels

    def _decode(self, indices: Sequence[int]) -> Tensor:
        """uint8[b, channels of the split, height, width]."""
        return torch.stack([self._pixels_of(image) for image in self._split.read(indices)])

    def _pixels_of(self, image: Image.Image) -> Tensor:
        pixels = F.pil_to_tensor(image.convert(_PIL_MODES[self._split.channels]))
        if self._image_size:
            pixels = resize(pixels, self._image_size)
        if pixels.shape[1:] != (self.height, self.width):
            raise ValueError(
                f"the images of split {self._split.name!r} differ in size ({self.height}×{self.width} and "
                f"{pixels.shape[1]}×{pixels.shape[2]} pixels); set data.image_size"
            )
        return pixels


def resize(pixels: Tensor, size: int) -> Tensor:
    """Scale uint8[C, H, W] so that the shorter side has ``size`` pixels, and keep the square in the
    middle."""
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.center_crop(F.resize(pixels, [size], antialias=True), [size, size])
