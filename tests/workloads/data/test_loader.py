"""Batches: the same for every number of ranks and workers, from any step on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data import loader
from offload_sparse.workloads.data.loader import Batch, EvalLoader, TrainLoader
from offload_sparse.workloads.data.order import global_batch
from offload_sparse.workloads.data.source import Splits, load_splits
from tests.support import fork_server
from tests.support.constants import configured
from tests.workloads.data.images import assert_equal, parquet_folder, pixels, table, write_parquet

STEPS = 7  # more than two epochs of 26 images in batches of 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return parquet_folder(tmp_path, train=26, test=11, channels=3)


def config_of(folder: Path, **settings: object) -> DataConfig:
    augmented = {"batch_size": 8, "random_crop": 2, "random_flip": True}
    return configured(DataConfig, name=str(folder), **{**augmented, **settings})


def train_batches(
    splits: Splits, config: DataConfig, rank: int = 0, world_size: int = 1, start: int = 0, seed: int = 5
) -> list[Batch]:
    loader = TrainLoader(splits.train, config, rank, world_size, seed)
    return list(islice(loader.batches(start), STEPS - start))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_batches_laid_end_to_end_are_those_of_one_process(
    folder: Path, world_size: int, cache_bytes: int
) -> None:
    splits = load_splits(config_of(folder))
    alone = train_batches(splits, config_of(folder))
    config = config_of(folder, cache_bytes=cache_bytes)
    ranks = [train_batches(splits, config, rank, world_size) for rank in range(world_size)]
    together = [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_equal(together, alone)


def test_a_process_ends_with_its_workers_in_the_middle_of_the_images() -> None:
    """Workers leave stop signals to the run, and would not hear the SIGTERM of an interpreter that ends."""
    begun = fork_server.shared().run(f"{__name__}:begins_with_workers", [], os.environ, 120, unwinds=True)
    assert (begun.returncode, begun.stdout) == (0, "begun\n"), begun.stderr


def begins_with_workers(_: list[str]) -> None:
    config = DataConfig(batch_size=8, num_workers=2)
    batches = TrainLoader(load_splits(config).train, config).batches()
    next(batches)
    atexit.register(lambda: batches)  # still there when the interpreter ends
    del Workers._shutdown_workers, Workers.__del__  # as under a load that it does not wait for
    print("begun")


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_worker_processes_change_nothing(folder: Path, cache_bytes: int) -> None:
    splits = load_splits(config_of(folder))
    config = config_of(folder, num_workers=2, cache_bytes=cache_bytes)
    assert_equal(train_batches(splits, config), train_batches(splits, config_of(folder)))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_befalls_a_worker_is_said_in_the_same_line(folder: Path, workers: int) -> None:
    images = [*pixels(8, channels=3), *pixels(8, 6, 6, channels=3)]
    write_parquet(folder / "train.parquet", table(images, [0, 1] * 8, ("a", "b", "c")))
    config = config_of(folder, num_workers=workers, cache_bytes=0)
    line = r"^the images of split 'train' differ in size \(8×8 and 6×6 pixels\); set data\.image_size$"
    with pytest.raises(ValueError, match=line):
        train_batches(load_splits(config), config)


def test_any_step_can_be_the_first(folder: Path) -> None:
    splits, config = load_splits(config_of(folder)), config_of(folder)
    whole = train_batches(splits, config)
    for start in range(STEPS):
        assert_equal(train_batches(splits, config, start=start), whole[start:])


def test_a_step_reads_the_samplers_images_and_labels(folder: Path) -> None:
    config = config_of(folder, random_crop=0, random_flip=False)
    splits = load_splits(config)
    loader = TrainLoader(splits.train, config, seed=5)
    assert loader.steps_per_epoch == 3
    for step, batch in zip(range(STEPS), loader.batches(), strict=False):
        indices = global_batch(5, step // 3, step % 3, 26, 8)
        assert torch.equal(batch.images, loader.images.gather(indices))
        assert torch.equal(batch.labels, splits.train.labels[indices])
        assert batch.images.dtype == torch.uint8


def test_an_image_is_augmented_anew_in_each_epoch(folder: Path) -> None:
    config = config_of(folder, batch_size=26)
    epochs = train_batches(load_splits(config), config)
    seen = [{image.numpy().tobytes() for image in batch.images} for batch in epochs]
    assert len(seen[0] | seen[1]) > 1.5 * 26


def test_augmentation_is_for_training_only(folder: Path) -> None:
    config = config_of(folder)
    loader = EvalLoader(load_splits(config).test, config)
    (batch,) = loader
    assert torch.equal(batch.images, loader.images.gather(torch.arange(11)))


def test_the_global_generator_is_not_advanced(folder: Path) -> None:
    config = config_of(folder)
    splits = load_splits(config)
    state = torch.get_rng_state()
    train_batches(splits, config)
    list(EvalLoader(splits.test, config))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 1), (2, 1), (4, 0), (16, 0)])
def test_evaluation_reads_every_image_once_over_all_ranks(
    folder: Path, world_size: int, workers: int
) -> None:
    """Rank r the images r, r + R, r + 2R, …"""
    config = config_of(folder, num_workers=workers)
    split = load_splits(config).test
    images = EvalLoader(split, config).images.gather(torch.arange(11))
    for rank in range(world_size):
        read: list[int] = []
        for batch in EvalLoader(split, config, rank, world_size):
            assert torch.equal(batch.images, images[batch.indices])
            assert torch.equal(batch.labels, split.labels[batch.indices])
            read += batch.indices.tolist()
        assert read == list(range(rank, 11, world_size))


def test_large_splits_are_evaluated_in_batches_of_512_over_all_ranks() -> None:
    config = DataConfig(limit=1200)
    split = load_splits(config).test
    assert [len(batch.labels) for batch in EvalLoader(split, config)] == [512, 512, 176]
    assert [len(batch.labels) for batch in EvalLoader(split, config, 1, 2)] == [256, 256, 88]


def test_large_images_are_evaluated_in_batches_of_a_step() -> None:
    """Whose memory is planned; 4 MiB of them in any case."""
    for batch_size, sizes in ((32, [32, 32, 6]), (8, [16, 16, 16, 16, 6])):
        config = DataConfig(limit=70, image_size=512, batch_size=batch_size)
        loader = EvalLoader(load_splits(config).test, config)
        assert [len(batch.labels) for batch in loader] == sizes


def test_grey_images_reach_a_network_of_three_channels(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path, train=8)
    config = config_of(folder)
    splits = load_splits(config)
    grey = next(TrainLoader(splits.train, config).batches()).images
    colour = next(TrainLoader(splits.train, config, channels=3).batches()).images
    assert torch.equal(colour, grey.repeat(1, 3, 1, 1))
    assert next(iter(EvalLoader(splits.test, config, channels=3))).images.shape == (6, 3, 8, 8)


def test_a_batch_that_does_not_divide_is_refused(folder: Path) -> None:
    """Before any image is decoded."""
    config = config_of(folder)
    with pytest.raises(ValueError, match=r"does not divide over 3 ranks; set data\.batch_size to 6 or 9"):
        TrainLoader(load_splits(config).train, config, 0, 3)


def test_a_batch_above_the_split_is_refused(folder: Path) -> None:
    config = config_of(folder, batch_size=27)
    with pytest.raises(ValueError, match="only 26 training images"):
        TrainLoader(load_splits(config).train, config)


def _begins_with_a_signal(number: int) -> None:
    os.kill(os.getpid(), number)
    loader._leave_signals_to_the_run(0)
    os._exit(7)


@pytest.mark.parametrize("number", loader._STOPPING)
def test_a_signal_to_a_worker_that_has_just_begun_does_not_end_it(number: int) -> None:
    """It is sent before the worker could say that it leaves signals to the run."""
    worker = multiprocessing.get_context("fork").Process(target=_begins_with_a_signal, args=(number,))
    with loader._signals_wait():
        worker.start()
    worker.join(60)
    assert worker.exitcode == 7
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(loader._STOPPING)
