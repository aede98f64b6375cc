"""Decoded images: one uint8 tensor where a split fits in memory, else decoded on access."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.augmentation import Box, Crop, cut, scale
from offload_sparse.workloads.data.cache import Decoded, PixelCache, WriteFile
from offload_sparse.workloads.data.corrupt import Corrupt, CorruptImages, substitute
from offload_sparse.workloads.data.decode import Stored, UndecodableError, decode_pixels
from offload_sparse.workloads.data.source import Split

_BAR_DELAY_SECONDS = 5.0
_CHUNK = 256
_MOST_SUBSTITUTES = 100


class ImageSet:
    """The images uint8[channels, height, width] and labels int64[N] of one split, by index.

    A split that takes no more than ``data.cache_bytes`` when decoded is decoded here, once (``cached``);
    others are decoded by ``gather`` each time, or once for all runs into ``data.cache``. So is a training
    split with ``data.train_crop`` resized, which needs the images in their own sizes; in ``data.cache`` these
    are kept as ``squares``, stretched, from which the same parts are cut. Raises ValueError: the images
    differ in size and ``data.image_size`` is 0, an image cannot be decoded, the cache cannot be used, or
    ``channels`` cannot be had.

    Args:
        channels: channels that ``gather`` returns, 3 repeats grey images; ``None`` takes those of the images.
        progress: draw a progress bar while decoding if that takes longer than 5 seconds.
        corrupt: counts what cannot be decoded; ``None`` counts up to ``data.corrupt_limit`` without a log.
        training: whether the images are for training.
        write: writes the files of ``data.cache``; ``None`` does without it."""

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        channels: int | None = None,
        progress: bool = False,
        corrupt: CorruptImages | None = None,
        training: bool = False,
        write: WriteFile | None = None,
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
        self._shorter_side = config.image_size if training else config.eval_resize or config.image_size
        self.height, self.width = split.image_shape(config.image_size)
        decoded_bytes = len(split) * split.channels * self.height * self.width
        own_sizes = training and config.train_crop == "resized"
        self.cached = not own_sizes and decoded_bytes <= config.cache_bytes
        self.squares = own_sizes and bool(config.cache) and write is not None
        self._pixels: Tensor | None = None
        self._cache: PixelCache | None = None
        if self.cached:
            # Which image each row of the cache holds: another one where a row is corrupt.
            self._shown = torch.arange(len(split))
            self._pixels = self._decode_all(progress)
        elif config.cache and write is not None:
            self._cache = self._open_cache(config, write, progress)
            self.corrupt.add(self._cache.corrupt)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` int64[b], as uint8[b, channels, height, width]; corrupt ones are counted
        and replaced."""
        found = self.decode(indices)
        self.corrupt.add(found.corrupt)
        return found.pixels

    def decode(self, indices: Tensor) -> Decoded:
        """The middles of the images at ``indices`` int64[b], another image in the place of each corrupt one,
        which is not counted here: this may run in a worker process. Raises ValueError: a hundred images in a
        row cannot be decoded."""
        found = self.uncut(indices)
        if found.parts is None:
            return found
        return found._replace(pixels=cut(found.pixels, found.parts, self._image_size), parts=None)

    def uncut(self, indices: Tensor, crop: Crop | None = None) -> Decoded:
        """As ``decode``, but the parts that ``crop`` chooses, and of ``squares`` these as they are, with what
        is to be cut out of each."""
        if self._pixels is not None:
            assert crop is None, "a cached split has lost the sizes of its images"
            found = Decoded(self._pixels[indices], self._shown[indices])
        elif self._cache is not None:
            parts = self.parts(indices, crop or _middle) if self.squares else None
            found = Decoded(self._cache.gather(indices), self._cache.shown[indices], parts=parts)
        else:
            found = self._decode_anew(indices, crop)
        return found._replace(pixels=found.pixels.expand(-1, self.channels, -1, -1))

    def parts(self, indices: Tensor, crop: Crop) -> Tensor:
        """What to cut out of the squares of ``indices``, int64[b, 4]: the parts of the images that ``crop``
        chooses, in pixels of the squares."""
        assert self._cache is not None, "only data.cache holds squares"
        side, boxes = _square_side(self._image_size), []
        for position, (height, width) in enumerate(self._cache.sides[indices].tolist()):
            box = crop(position, height, width)
            top, left = box.top * side // height, box.left * side // width
            bottom = -(-(box.top + box.height) * side // height)
            right = -(-(box.left + box.width) * side // width)
            boxes.append(Box(top, left, bottom - top, right - left))
        return torch.tensor(boxes, dtype=torch.int64)

    def _open_cache(self, config: DataConfig, write: WriteFile, progress: bool) -> PixelCache:
        side = _square_side(self._image_size)
        height, width = (side, side) if self.squares else (self.height, self.width)
        # ``exact`` was one of two ways to decode in earlier versions, whose caches serve on.
        recipe = f"{height}x{width} {'square' if self.squares else self._shorter_side} exact"
        size, lock = self._split.channels * height * width, Lock()

        def decode(indices: Tensor) -> Decoded:
            sides = torch.zeros(len(indices), 2, dtype=torch.int64)

            def whole(position: int, height: int, width: int) -> Box:
                sides[position] = torch.tensor([height, width])
                return Box(0, 0, height, width)

            found = self._decode_anew(indices, whole if self.squares else None, (height, width), lock)
            return found._replace(sides=sides)

        folder = Path(config.cache).expanduser()
        return PixelCache(folder, self._split, recipe, size, decode, write, progress)

    def _decode_anew(
        self,
        indices: Tensor,
        crop: Crop | None = None,
        to_file: tuple[int, int] | None = None,
        reading: AbstractContextManager[Any] = nullcontext(),  # noqa: B008
    ) -> Decoded:
        shape = len(indices), self._split.channels, *(to_file or (self.height, self.width))
        # Colours lie side by side as they do in decoded images, but not in files.
        layout = torch.contiguous_format if to_file else torch.channels_last
        pixels = torch.empty(shape, dtype=torch.uint8, memory_format=layout)
        shown = indices.clone()
        corrupt: list[Corrupt] = []
        missing = list(range(len(indices)))
        for attempt in range(_MOST_SUBSTITUTES):
            failed = []
            with reading:
                encoded = self._split.stored(shown[missing].tolist())
            for position, stored in zip(missing, encoded, strict=True):
                try:
                    self._read(stored, position, crop, pixels[position])
                except UndecodableError as error:
                    corrupt.append(Corrupt(self._split.name, int(shown[position]), str(error)))
                    shown[position] = substitute(int(indices[position]), attempt, len(self))
                    failed.append(position)
            if not failed:
                return Decoded(pixels, shown, tuple(corrupt))
            missing = failed
        raise ValueError(
            f"no image of split {self._split.name!r} could be decoded in {_MOST_SUBSTITUTES} tries "
            f"({corrupt[-1].reason}); correct data.name or data.columns"
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

    def _read(self, stored: Stored, position: int, crop: Crop | None, out: Tensor) -> None:
        """Decode an image into ``out`` uint8[channels, height, width]."""
        pixels = decode_pixels(stored, self._split.channels)
        if crop is not None:
            scale(pixels, crop(position, *pixels.shape[1:]), out)
            return
        if self._image_size:
            pixels = resize(pixels, self._image_size, self._shorter_side)
        if pixels.shape != out.shape:
            raise ValueError(
                f"the images of split {self._split.name!r} differ in size ({self.height}×{self.width} and "
                f"{pixels.shape[1]}×{pixels.shape[2]} pixels); set data.image_size"
            )
        out.copy_(pixels)


def _square_side(image_size: int) -> int:
    """256 for images of 224 pixels, as evaluation scales them by custom."""
    return round(image_size * 8 / 7)


def _middle(position: int, height: int, width: int) -> Box:
    del position
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def resize(pixels: Tensor, size: int, shorter_side: int) -> Tensor:
    """Scale uint8[C, H, W] so that the shorter side has ``shorter_side`` pixels, and keep the square of
    ``size`` pixels in the middle."""
    if pixels.shape[1:] == (size, size) and shorter_side == size:
        return pixels
    return F.center_crop(F.resize(pixels, [shorter_side], antialias=True), [size, size])
