"""Random crops and flips as a function of (seed, epoch, image index) alone.

No generator is advanced, so an image looks the same in a given epoch whichever rank or worker process reads
it, and a batch is augmented in one gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from offload_sparse.workloads.data.order import mix, seed_of

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_STRIDE = np.uint64(0xD1342543DE82EF95)  # odd, so that the numbers of one image are all different


class Draws(NamedTuple):
    """What is done to each image of a batch: the first row and column of its crop in the padded image,
    int64[b], and whether the crop is mirrored, bool[b]."""

    top: Tensor
    left: Tensor
    flip: Tensor


def draw(seed: int, epoch: int, indices: Tensor, padding: int) -> Draws:
    """Draw the crop offsets, uniform on 0 … 2·padding, and the flips, of the images ``indices`` int64[b] in
    ``epoch``."""
    keys = image_keys(seed, epoch, indices)
    top = _uniform(keys ^ np.uint64(1), 2 * padding + 1)
    left = _uniform(keys ^ np.uint64(2), 2 * padding + 1)
    return Draws(top, left, _uniform(keys ^ np.uint64(3), 2).bool())


def image_keys(seed: int, epoch: int, indices: Tensor) -> npt.NDArray[np.uint64]:
    """What is random about each image of ``indices`` int64[b] in ``epoch``: uint64[b]."""
    base = np.uint64(seed_of(seed, epoch, 1))
    return mix(base ^ mix(indices.numpy().astype(np.uint64)))


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


Crop = Callable[[int, int, int], Box]
"""(position in the batch, height, width of the image) -> the part of it that is scaled to the image size."""


def random_parts(keys: npt.NDArray[np.uint64]) -> Crop:
    """The parts of images that a random resized crop keeps, by the keys uint64[b] of ``image_keys``.

    Area uniform on 8-100 % of the image, logarithm of the aspect ratio uniform between those of 3:4 and 4:3;
    ten tries to fit such a part into the image, then the largest middle part whose aspect ratio lies between
    (Szegedy et al. 2015, as in torchvision's RandomResizedCrop)."""
    numbers = mix(keys[:, None] + np.arange(4, 4 + 4 * _TRIES, dtype=np.uint64) * _STRIDE) >> np.uint64(11)
    uniforms = (numbers.astype(np.float64) * 2.0**-53).reshape(-1, _TRIES, 4).tolist()

    def part(position: int, height: int, width: int) -> Box:
        (least, most), (narrowest, widest) = _AREA, _ASPECT
        for area, aspect, vertical, horizontal in uniforms[position]:
            target = height * width * (least + (most - least) * area)
            ratio = math.exp(math.log(narrowest) + (math.log(widest) - math.log(narrowest)) * aspect)
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w)
        w, h = width, height
        if width < narrowest * height:
            h = round(width / narrowest)
        elif width > widest * height:
            w = round(height * widest)
        return Box((height - h) // 2, (width - w) // 2, h, w)

    return part


def _uniform(keys: npt.NDArray[np.uint64], count: int) -> Tensor:
    """int64[b] in [0, count) by Lemire's multiply-and-shift on 32 bits of each hashed key."""
    high = mix(keys) >> np.uint64(32)
    return torch.from_numpy(((high * np.uint64(count)) >> np.uint64(32)).astype(np.int64))


def augment(images: Tensor, draws: Draws, padding: int, flip: bool) -> Tensor:
    """Crop images uint8[b, C, H, W] out of themselves with ``padding`` pixels of zeros on each side (0 crops
    nothing), and mirror some of them if ``flip``. Returns as many of the same size."""
    if not padding:
        return torch.where(draws.flip[:, None, None, None], images.flip(3), images) if flip else images
    batch, channels, height, width = images.shape
    rows = draws.top[:, None] + torch.arange(height, device=images.device)
    columns = draws.left[:, None] + torch.arange(width, device=images.device)
    if flip:
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
    padded = F.pad(images, [padding])
    rows = rows[:, None, :, None].expand(batch, channels, height, padded.shape[3])
    columns = columns[:, None, None, :].expand(batch, channels, height, width)
    return padded.gather(2, rows).gather(3, columns)


def cut(images: Tensor, parts: Tensor, size: int) -> Tensor:
    """Cut a part out of each image uint8[b, C, H, W] and scale it to uint8[b, C, size, size], smoothing where
    it shrinks; ``parts`` is int64[b, 4]: top, left, height and width. On the host image by image; on a device
    in one batched call, whose rounding differs (by two of 256 levels at most)."""
    if images.device.type != "cpu":
        return cut_in_one_call(images, parts, size)
    out = images.new_empty(*images.shape[:2], size, size)
    for image, part, place in zip(images, parts.tolist(), out, strict=True):
        scale(image, Box(*part), place)
    return out


def scale(image: Tensor, part: Box, out: Tensor) -> None:
    """Scale a part of uint8[C, h, w] into ``out`` uint8[C, H, W] on the host, smoothing where it shrinks: the
    operator below torchvision's ``resize``, which writes where it is told."""
    top, left, height, width = part
    source = image[None, :, top : top + height, left : left + width]
    torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[1:], False, out=out[None])


def cut_in_one_call(images: Tensor, parts: Tensor, size: int) -> Tensor:
    """As ``cut``: the triangle filter along each axis is a matrix per image, two products scale the batch."""
    rows = _triangles(parts[:, 0], parts[:, 2], images.shape[2], size)
    columns = _triangles(parts[:, 1], parts[:, 3], images.shape[3], size)
    # Rounded in between, as on the host.
    scaled = rows[:, None] @ (images.float() @ columns[:, None].mT).round_()
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _triangles(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """float[b, size, source]: weights of the positions of an axis in each of ``size`` positions, for parts
    that begin at ``start`` int64[b] and take ``length`` int64[b]."""
    scale = (length / size)[:, None, None]
    here = torch.arange(size, device=start.device)[:, None] + 0.5
    there = torch.arange(source, device=start.device) + 0.5 - start[:, None, None]
    weights = (1 - ((there - here * scale) / scale.clamp_min(1)).abs()).clamp_min(0)
    weights = weights * ((there > 0) & (there < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)
