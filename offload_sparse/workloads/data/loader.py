"""Batches of images and labels, for training and for evaluation."""

from __future__ import annotations

import multiprocessing
import signal
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from multiprocessing import util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.augmentation import Draws, augment, cut, draw, image_keys, random_parts
from offload_sparse.workloads.data.cache import WriteFile
from offload_sparse.workloads.data.corrupt import Corrupt, CorruptImages
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.order import check_batch, global_batch, rank_part, steps_per_epoch
from offload_sparse.workloads.data.parquet import ParquetStream
from offload_sparse.workloads.data.source import EMBEDDED, Split

_EVALUATION_BATCH = 512
_SMALL = 4 << 20
"""Bytes of images that are evaluated at once in any case; of larger ones no more than a step trains on, which
is what is planned."""

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_EMBEDDED = {"num_classes": 10, "channels": 1, "image_size": 28, "train_images": 12_000}


class Batch(NamedTuple):
    """What one rank reads for one step.

    Attributes:
        images: uint8[b, C, H, W].
        labels: int64[b].
        indices: int64[b], their places in the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class _Item(NamedTuple):
    """A batch on its way out of a worker process, what could not be decoded for it, and what is still to be
    done: which parts to cut out of its images, and how to augment them."""

    batch: Batch
    corrupt: tuple[Corrupt, ...]
    parts: Tensor | None = None
    draws: Draws | None = None


class _Loader(Dataset[_Item | Exception]):
    """Batches by number, and in an order; ``images`` is the decoded split."""

    def __init__(self, images: ImageSet, num_workers: int) -> None:
        self.images, self._num_workers = images, num_workers

    def __getitem__(self, number: int) -> _Item | Exception:
        """An item, or what has befallen it: torch would tell of it with the traceback of the worker."""
        try:
            return self.item(number)
        except (ValueError, OSError) as error:
            return error

    @abstractmethod
    def item(self, number: int) -> _Item:
        """The batch of this number."""

    def finished(self, item: _Item) -> _Item:
        """The item with what is left to do done, in the process that trains."""
        return item

    def _in_order(self, order: Iterable[int]) -> Iterator[Batch]:
        """The batches in ``order``, after counting what was corrupt in each."""
        loader: DataLoader[_Item | Exception] = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch already
            sampler=order,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each iterator would take a number from the global generator
            worker_init_fn=_leave_signals_to_the_run,
        )
        if self._num_workers:
            _end_workers_at_exit()
        with _signals_wait():  # a worker that has just begun has torch's handler, which ends it
            items = iter(loader)
        try:
            for item in items:
                if isinstance(item, Exception):
                    raise item
                self.images.corrupt.add(item.corrupt)
                yield self.finished(item).batch
        finally:
            # An error's traceback would keep it until the next collection of garbage, which closes its queues
            # first: torch then waits ten seconds for workers that nobody can tell to end.
            del items


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that stop a run reach neither this thread nor workers that begin meanwhile until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole process group asks the run to save and end, which needs its workers until then;
    they end with it."""
    del worker
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


@cache
def _end_workers_at_exit() -> None:
    """The interpreter ends the workers that are left by SIGTERM, and waits: ours would not hear it."""
    util.Finalize(None, _kill_workers, exitpriority=1)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class TrainLoader(_Loader):
    """Training batches without end; the position is the number of the optimizer step and nothing else.

    The batches do not depend on ``config.num_workers``, and those of R ranks, laid end to end by rank, are
    the batches of one rank. ``steps_per_epoch`` counts whole batches; the images that are left over wait for
    another permutation. Raises ValueError: the global batch does not divide over the ranks or exceeds the
    split, or the images cannot be read.

    Args:
        seed: seed of data order and augmentation, the same on every rank.
        channels, progress, corrupt, write: as for ``ImageSet``; the bar is drawn on rank 0.
        device: where batches are wanted. For one that is not the CPU, images are cut out and augmented there.
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
        corrupt: CorruptImages | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        write: WriteFile | None = None,
    ) -> None:
        check_batch(config.batch_size, world_size)
        self.steps_per_epoch = steps_per_epoch(len(split), config.batch_size)
        images = ImageSet(split, config, channels, progress and rank == 0, corrupt, True, write)
        super().__init__(images, config.num_workers)
        self._split, self._config, self._seed = split, config, seed
        self._rank, self._world_size = rank, world_size
        self.device = device
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of the steps ``start_step``, ``start_step + 1``, … over as many epochs as are
        read."""
        return self._in_order(count(start_step))

    def at(self, steps: Sequence[int]) -> Iterator[Batch]:
        return self._in_order(steps)

    def item(self, step: int) -> _Item:
        config, images = self._config, self.images
        epoch, step = divmod(step, self.steps_per_epoch)
        indices = rank_part(self._global_batch(epoch, step), self._rank, self._world_size)
        resized = config.train_crop == "resized"
        crop = random_parts(image_keys(self._seed, epoch, indices)) if resized else None
        found = images.uncut(indices, crop)
        batch = Batch(found.pixels, images.labels[found.indices], found.indices)
        draws = draw(self._seed, epoch, indices, config.random_crop)
        item = _Item(batch, found.corrupt, found.parts, draws)
        return self.finished(item) if self.device.type == "cpu" else item

    def finished(self, item: _Item) -> _Item:
        """The item on the device, its images cut and augmented there; nothing waits for it."""
        if item.draws is None:
            return item
        config, moved = self._config, partial(Tensor.to, device=self.device, non_blocking=True)
        images = moved(item.batch.images)
        if item.parts is not None:
            images = cut(images, moved(item.parts), config.image_size)
        images = augment(images, Draws(*map(moved, item.draws)), config.random_crop, config.random_flip)
        return _Item(Batch(images, moved(item.batch.labels), item.batch.indices), item.corrupt)

    def _global_batch(self, epoch: int, step: int) -> Tensor:
        size, table = self._config.batch_size, self._split.table
        if not isinstance(table, ParquetStream):
            return global_batch(self._seed, epoch, step, len(self.images), size)
        if self._order[0] != epoch:
            self._order = (epoch, table.order(self._seed, epoch))
        return self._order[1][step * size : (step + 1) * size].clone()


class EvalLoader(_Loader):
    """Every image of a split that can be decoded, once: rank r reads the images r, r + R, r + 2R, …

    Ranks may read different numbers of images and batches, so sums are to be reduced over ranks, not means.
    Arguments and errors are those of ``TrainLoader``."""

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        *,
        channels: int | None = None,
        progress: bool = False,
        corrupt: CorruptImages | None = None,
        write: WriteFile | None = None,
    ) -> None:
        images = ImageSet(split, config, channels, progress and rank == 0, corrupt, write=write)
        super().__init__(images, config.num_workers)
        mine = torch.arange(len(split))[rank::world_size]
        small = _SMALL // (images.channels * images.height * images.width)
        size = min(_EVALUATION_BATCH, max(config.batch_size, small))
        self._parts = mine.split(max(1, size // world_size)) if len(mine) else ()

    def __iter__(self) -> Iterator[Batch]:
        batches = self._in_order(range(len(self._parts)))
        return (batch for batch in batches if len(batch.labels))  # networks may want at least one image

    def item(self, number: int) -> _Item:
        """Corrupt images are left out."""
        indices = self._parts[number]
        found = self.images.decode(indices)
        intact = found.indices == indices
        indices = indices[intact]
        return _Item(Batch(found.pixels[intact], self.images.labels[indices], indices), found.corrupt)


@dataclass(frozen=True)
class DeclaredData:
    """A data set, unread: ``image_shape`` is height and width in pixels, ``train_images`` what training reads
    per epoch, after what is held out and limited. Of sequences of ``tokens`` the classes are words, the
    images sequences, and ``channels``, height and width 0."""

    num_classes: int
    channels: int
    image_shape: tuple[int, int]
    train_images: int
    tokens: int = 0


def declared_data(config: DataConfig) -> DeclaredData:
    """The data set as ``config`` declares it. Raises ValueError: the configuration leaves something open;
    names the key."""
    tokens = int(config.declared.get("tokens", 0))
    known = _EMBEDDED if config.name == EMBEDDED and not tokens else {}
    given = config.declared | {"image_size": config.image_size}
    values = {name: int(given.get(name) or known.get(name, 0)) for name in _EMBEDDED}
    for name, value in values.items():
        if not value and not (tokens and name in ("channels", "image_size")):
            raise ValueError(
                f"{name} is 0, but the images of {config.name!r} are not read here; set "
                f"{'data.image_size' if name == 'image_size' else f'data.declared.{name}'}"
            )
    values["train_images"] -= config.held_out(values["train_images"])
    if config.limit:
        values["train_images"] = min(values["train_images"], config.limit)
    side = values.pop("image_size")
    return DeclaredData(**values, image_shape=(side, side), tokens=tokens)
