"""Corrupt images: named in a log, replaced by the same image on every rank, not evaluated, limited."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.corrupt import Corrupt, CorruptImages, substitute
from offload_sparse.workloads.data.loader import Batch, EvalLoader, TrainLoader
from offload_sparse.workloads.data.source import load_splits
from tests.support.constants import configured
from tests.workloads.data.jpegs import BROKEN, write_folder, write_shards

RECIPE: dict[str, Any] = {"image_size": 16, "batch_size": 12, "cache_bytes": 0}


@pytest.fixture(params=["folder", "shards", "streamed shards", "cached folder"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """24 training images, two of which cannot be decoded."""
    if "folder" in request.param:
        recipe = RECIPE | ({"cache_bytes": 1 << 20} if "cached" in request.param else {})
        return configured(DataConfig, name=str(write_folder(tmp_path / "data", broken=True)), **recipe)
    folder = write_shards(tmp_path / "data", broken=True)
    return configured(DataConfig, name=str(folder), streaming=request.param.startswith("streamed"), **RECIPE)


def epoch(config: DataConfig, corrupt: CorruptImages, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader = TrainLoader(load_splits(config).train, config, rank, world_size, corrupt=corrupt)
    return list(islice(loader.batches(), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_counted_once_and_named_in_the_log(
    config: DataConfig, workers: int, tmp_path: Path
) -> None:
    """Whether this process or a worker met them, and however often."""
    config = replace(config, num_workers=workers)
    corrupt = CorruptImages(config.corrupt_limit, tmp_path / "run" / "corrupt_images.log")
    epoch(config, corrupt)
    epoch(config, corrupt)
    assert len(corrupt) == 2
    assert corrupt.log is not None
    lines = corrupt.log.read_text().splitlines()
    for row in BROKEN.values():
        assert (
            sum(line.startswith(f"image {row} of split 'train' cannot be decoded (") for line in lines) == 1
        )


def test_ranks_count_what_all_of_them_have_met(config: DataConfig, tmp_path: Path) -> None:
    """In the log that they share; in an epoch each image is met by one of them, unless it is cached."""
    ranks = [CorruptImages(config.corrupt_limit, tmp_path / "corrupt_images.log") for _ in range(2)]
    for rank, corrupt in enumerate(ranks):
        epoch(config, corrupt, rank, 2)
    assert [len(corrupt) for corrupt in ranks] == [2, 2]


def test_a_corrupt_image_and_its_label_are_replaced(config: DataConfig) -> None:
    """By another image of the same split, and its label."""
    images = TrainLoader(load_splits(config).train, config).images
    found = images.decode(torch.arange(24))
    for row in range(24):
        expected = row
        attempt = 0
        while expected in BROKEN.values():
            expected = substitute(row, attempt, 24)
            attempt += 1
        assert int(found.indices[row]) == expected
        assert torch.equal(found.pixels[row], found.pixels[expected])
    batches = epoch(config, CorruptImages(100))
    label_of = {
        image.numpy().tobytes(): int(i) * 3 // 24
        for i, image in zip(found.indices, found.pixels, strict=True)
    }
    for batch in batches:
        assert [label_of[image.numpy().tobytes()] for image in batch.images] == batch.labels.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_every_number_of_ranks_takes_the_same_replacement(config: DataConfig, workers: int) -> None:
    alone = epoch(config, CorruptImages(100))
    config = replace(config, num_workers=workers)
    ranks = [epoch(config, CorruptImages(100), rank, 3) for rank in range(3)]
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([batches[number].images for batches in ranks]), batch.images)
        assert torch.equal(torch.cat([batches[number].labels for batches in ranks]), batch.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_corrupt_images_out(config: DataConfig, workers: int) -> None:
    config = replace(config, num_workers=workers)
    corrupt, split = CorruptImages(100), load_splits(config).train
    (batch,) = EvalLoader(split, config, corrupt=corrupt)
    intact = [row for row in range(24) if row not in BROKEN.values()]
    assert batch.labels.tolist() == [row * 3 // 24 for row in intact]
    assert len(batch.images) == 22
    assert len(corrupt) == 2
    for row in BROKEN.values():
        assert not list(EvalLoader(split, config, row, 24, corrupt=corrupt)), "not even a batch of none"


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_limit_is_an_error_that_names_the_log(
    config: DataConfig, workers: int, tmp_path: Path
) -> None:
    corrupt = CorruptImages(1, tmp_path / "corrupt_images.log")
    config = replace(config, num_workers=workers)
    with pytest.raises(ValueError, match=r"corrupt_images\.log, and 1 are allowed") as caught:
        epoch(config, corrupt)
    assert not multiprocessing.active_children(), "workers end with the batches, not with the traceback"
    assert "\n" not in str(caught.value)


def test_too_many_corrupt_images_are_refused_at_the_start(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(config), "corrupt_limit", 1)
    with pytest.raises(ValueError, match="image 4 of split 'train' cannot be decoded"):
        load_splits(config)


def test_without_a_log_the_count_is_limited_all_the_same() -> None:
    corrupt = CorruptImages(2)
    corrupt.add([Corrupt("train", 1, "why"), Corrupt("test", 1, "why"), Corrupt("train", 1, "why")])
    assert len(corrupt) == 2
    with pytest.raises(ValueError, match=r"image 7 of split 'test' cannot be decoded \(broken\)"):
        corrupt.add([Corrupt("test", 7, "broken")])


def test_substitutes_lie_in_the_split_and_differ_between_attempts() -> None:
    found = [substitute(5, attempt, 1000) for attempt in range(50)]
    assert all(0 <= index < 1000 for index in found)
    assert len(set(found)) > 40


def test_a_run_that_carries_on_names_no_image_again_and_counts_all(tmp_path: Path) -> None:
    log = tmp_path / "corrupt.log"
    CorruptImages(10, log).add([Corrupt("train", 3, "truncated"), Corrupt("it's", 4, "truncated")])
    again = CorruptImages(10, log)
    again.add([Corrupt("train", 3, "truncated"), Corrupt("train", 5, "truncated")])
    assert len(again) == 3
    assert len(log.read_text().splitlines()) == 3
