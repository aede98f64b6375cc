"""Batches of images and labels, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from offload_sparse.config import DataConfig
from offload_sparse.data.augmentation import augment, draw
from offload_sparse.data.images import ImageSet
from offload_sparse.data.sampler import check_batch, global_batch, rank_part, steps_per_epoch
from offload_sparse.data.source import Split

_EVALUATION_BATCH = 512


class Batch(NamedTuple):
    """What one rank reads for one step.

    Attributes:
        images: uint8[b, C, H, W].
        labels: int64[b].
    """

    images: Tensor
    labels: Tensor


class _TrainBatches(Dataset[Batch]):
    """This rank's part of the batch of every optimizer step, by the step's number."""

    def __init__(self, images: ImageSet, config: DataConfig, rank: int, world_size: int, seed: int) -> None:
        self.images = images
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

    def __getitem__(self, step: int) -> Batch:
        config, size = self.config, len(self.images)
        epoch, step = divmod(step, steps_per_epoch(size, config.batch_size))
        indices = global_batch(self.seed, epoch, step, size, config.batch_size)
        indices = rank_part(indices, self.rank, self.world_size)
        draws = draw(self.seed, epoch, indices, config.random_crop)
        images = augment(self.images.gather(indices), draws, config.random_crop, config.random_flip)
        return Batch(images, self.images.labels[indices])


class _EvalBatches(Dataset[Batch]):
    """This rank's images in batches, by the batch's number."""

    def __init__(self, images: ImageSet, parts: tuple[Tensor, ...]) -> None:
        self.images = images
        self.parts = parts

    def __getitem__(self, number: int) -> Batch:
        indices = self.parts[number]
        return Batch(self.images.gather(indices), self.images.labels[indices])


class _From(Sampler[int]):
    """start, start + 1, … without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)


def _loader(batches: Dataset[Batch], order: Sampler[int] | range, num_workers: int) -> DataLoader[Batch]:
    return DataLoader(
        batches,
        batch_size=None,  # an item is a whole batch already
        sampler=order,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each iterator would take a number from the global generator
    )


class TrainLoader:
    """Training batches without end; the position is the number of the optimizer step and nothing else.

    The batches do not depend on ``config.num_workers``, and those of R ranks, laid end to end by rank, are
    the batches of one rank.

    Args:
        split: training images.
        config: batch size, augmentation, workers.
        rank: rank of this process.
        world_size: number of ranks.
        seed: seed of data order and augmentation, the same on every rank.
        channels: channels of the batches' images; 3 repeats grey images; ``None`` takes those of the images.
        progress: draw a bar (on rank 0) if decoding takes longer than 5 seconds.

    Attributes:
        images: the decoded split.
        steps_per_epoch: optimizer steps in one pass; the images that are left over wait for another
            permutation.

    Raises:
        ValueError: the global batch does not divide over the ranks or exceeds the split, or the images cannot
            be read.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        channels: int | None = None,
        progress: bool = False,
    ) -> None:
        check_batch(config.batch_size, world_size)
        self.steps_per_epoch = steps_per_epoch(len(split), config.batch_size)
        self.images = ImageSet(split, config, channels, progress and rank == 0)
        self._batches = _TrainBatches(self.images, config, rank, world_size, seed)
        self._num_workers = config.num_workers

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of the steps ``start_step``, ``start_step + 1``, … over as many epochs as are
        read."""
        return iter(_loader(self._batches, _From(start_step), self._num_workers))


class EvalLoader:
    """Every image of a split once, none twice: rank r reads the images r, r + R, r + 2R, …

    Ranks may read different numbers of images and batches, so sums are to be reduced over ranks, not means.

    Args:
        split: images to evaluate on.
        config: workers and image size.
        rank: rank of this process.
        world_size: number of ranks.
        channels: channels of the batches' images; 3 repeats grey images; ``None`` takes those of the images.
        progress: draw a bar (on rank 0) if decoding takes longer than 5 seconds.

    Attributes:
        images: the decoded split.
        size: images of the whole split, over all ranks.

    Raises:
        ValueError: the images cannot be read.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        *,
        channels: int | None = None,
        progress: bool = False,
    ) -> None:
        self.images = ImageSet(split, config, channels, progress and rank == 0)
        self.size = len(split)
        mine = torch.arange(self.size)[rank::world_size]
        self._parts = mine.split(max(1, _EVALUATION_BATCH // world_size)) if len(mine) else ()
        self._num_workers = config.num_workers

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        batches = _EvalBatches(self.images, self._parts)
        return iter(_loader(batches, range(len(self._parts)), self._num_workers))
