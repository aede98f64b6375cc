"""Decoded images: one uint8 tensor where a split fits in memory, else decoded on access."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.augmentation import Box
from offload_sparse.workloads.data.corrupt import Corrupt, CorruptImages, substitute
from offload_sparse.workloads.data.decode import Stored, UndecodableError, decode_part
from offload_sparse.workloads.data.source import Split

_BAR_DELAY_SECONDS = 5.0
_CHUNK = 256
_MOST_SUBSTITUTES = 100

Crop = Callable[[int, int, int], Box]
"""(position in the batch, height, width of the image) -> the part of it that is scaled to the image size."""


class Decoded(NamedTuple):
    """Images as they go into a batch.

    Attributes:
        pixels: uint8[b, channels, height, width].
        indices: int64[b], the images that these are: where one is corrupt, the one in its place.
        corrupt: what could not be decoded on the way.
    """

    pixels: Tensor
    indices: Tensor
    corrupt: tuple[Corrupt, ...]


class ImageSet:
    """The images and labels of one split, by index.

    A split that takes no more than ``DataConfig.cache_bytes`` when decoded is decoded here, once; others are
    decoded by ``gather`` each time, and so is a training split with ``data.train_crop`` resized, which needs
    the images in their own sizes.

    Args:
        split: what to decode.
        config: image sizes and ``cache_bytes`` are read from it.
        channels: channels that ``gather`` returns, 3 repeats grey images; ``None`` takes those of the images.
        progress: draw a progress bar while decoding if that takes longer than 5 seconds.
        corrupt: counts what cannot be decoded; ``None`` counts up to ``corrupt_limit`` without a log.
        training: whether the images are for training.

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
        self,
        split: Split,
        config: DataConfig,
        channels: int | None = None,
        progress: bool = False,
        corrupt: CorruptImages | None = None,
        training: bool = False,
    ) -> None:
        self.channels = split.channels if channels is None else channels
        if self.channels not in (split.channels, 3):
            raise ValueError(
                f"a network of {self.channels} channel(s) cannot read RGB images; build it with 3 channels"
            )
        self.labels = split.labels
        self.corrupt = CorruptImages(config.corrupt_limit) if corrupt is None else corrupt
        self._split = split
        self._image_size = config.image_size
        self._scaled = config.decode == "scaled"
        self._shorter_side = config.image_size if training else config.eval_resize or config.image_size
        self.height, self.width = split.image_shape(config.image_size)
        decoded_bytes = len(split) * split.channels * self.height * self.width
        own_sizes = training and config.train_crop == "resized"
        self.cached = not own_sizes and decoded_bytes <= config.cache_bytes
        self._pixels: Tensor | None = None
        if self.cached:
            # Which image each row of the cache holds: another one where a row is corrupt.
            self._shown = torch.arange(len(split))
            self._pixels = self._decode_all(progress)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` int64[b], as uint8[b, channels, height, width]; corrupt ones are counted
        and replaced."""
        found = self.decode(indices)
        self.corrupt.add(found.corrupt)
        return found.pixels

    def decode(self, indices: Tensor, crop: Crop | None = None) -> Decoded:
        """The images at ``indices`` int64[b], another in the place of each corrupt one.

        What is corrupt is not counted here: this may run in a worker process.

        Args:
            crop: what to cut out of each image before it is scaled; by default its middle.

        Raises:
            ValueError: a hundred images in a row cannot be decoded.
        """
        if self._pixels is None:
            found = self._decode_anew(indices, crop)
        else:
            assert crop is None, "a cached split has lost the sizes of its images"
            found = Decoded(self._pixels[indices], self._shown[indices], ())
        return found._replace(pixels=found.pixels.expand(-1, self.channels, -1, -1))

    def _decode_anew(self, indices: Tensor, crop: Crop | None = None) -> Decoded:
        shown, pixels = indices.clone(), [torch.empty(0)] * len(indices)
        corrupt: list[Corrupt] = []
        missing = list(range(len(indices)))
        for attempt in range(_MOST_SUBSTITUTES):
            failed = []
            for position, stored in zip(missing, self._split.stored(shown[missing].tolist()), strict=True):
                try:
                    pixels[position] = self._pixels_of(stored, position, crop)
                except UndecodableError as error:
                    corrupt.append(Corrupt(self._split.name, int(shown[position]), str(error)))
                    shown[position] = substitute(int(indices[position]), attempt, len(self))
                    failed.append(position)
            if not failed:
                return Decoded(torch.stack(pixels), shown, tuple(corrupt))
            missing = failed
        raise ValueError(
            f"no image of split {self._split.name!r} could be decoded in {_MOST_SUBSTITUTES} tries "
            f"({corrupt[-1].reason}); correct data.name or data.image_column"
        )

    def _decode_all(self, progress: bool) -> Tensor:
        pixels = torch.empty(len(self), self._split.channels, self.height, self.width, dtype=torch.uint8)
        name = f"decoding {self._split.name}"
        disable = None if progress else True  # None draws it on a terminal only
        with tqdm(total=len(self), desc=name, delay=_BAR_DELAY_SECONDS, disable=disable, leave=False) as bar:
            for rows in self._shown.split(_CHUNK):
                found = self._decode_anew(rows.clone())
                self.corrupt.add(found.corrupt)
                pixels[int(rows[0]) : int(rows[0]) + len(rows)] = found.pixels
                rows.copy_(found.indices)
                bar.update(len(rows))
        return pixels

    def _pixels_of(self, stored: Stored, position: int, crop: Crop | None) -> Tensor:
        channels, size = self._split.channels, self._image_size
        if crop is not None:
            part = decode_part(stored, channels, partial(crop, position), self._scaled * size)
            return F.resize(part, [size, size], antialias=True)
        pixels = decode_part(stored, channels, None, self._scaled * self._shorter_side)
        if size:
            pixels = resize(pixels, size, self._shorter_side)
        if pixels.shape[1:] != (self.height, self.width):
            raise ValueError(
                f"the images of split {self._split.name!r} differ in size ({self.height}×{self.width} and "
                f"{pixels.shape[1]}×{pixels.shape[2]} pixels); set data.image_size"
            )
        return pixels


def resize(pixels: Tensor, size: int, shorter_side: int = 0) -> Tensor:
    """Scale uint8[C, H, W] so that the shorter side has ``shorter_side`` pixels (0: ``size``), and keep the
    square of ``size`` pixels in the middle."""
    shorter_side = shorter_side or size
    if pixels.shape[1:] == (size, size) and shorter_side == size:
        return pixels
    return F.center_crop(F.resize(pixels, [shorter_side], antialias=True), [size, size])
