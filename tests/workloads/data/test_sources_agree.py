"""Folder, shards, streamed shards and the hub: the same photographs, in the same batches for every number of
ranks and workers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torchvision.transforms import v2

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data import source
from offload_sparse.workloads.data.loader import Batch, EvalLoader, TrainLoader
from offload_sparse.workloads.data.parquet import ParquetStream
from offload_sparse.workloads.data.source import Splits, load_splits
from tests.support.constants import configured
from tests.workloads.data.images import assert_equal
from tests.workloads.data.jpegs import (
    CLASSES,
    MODES,
    as_dataset,
    images_of,
    photograph,
    write_folder,
    write_shards,
)

RECIPE: dict[str, Any] = {
    "train_crop": "resized",
    "image_size": 16,
    "eval_resize": 20,
    "random_flip": True,
    "batch_size": 8,
    "cache_bytes": 0,
}
STEPS = 7  # two epochs of 24 images in batches of 8, and a third begun


@pytest.fixture(params=["folder", "shards", "streamed shards", "hub", "streamed hub"])
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """The same images in every kind of source."""
    kind = request.param
    streaming = kind.startswith("streamed")
    if kind == "folder":
        return configured(DataConfig, name=str(write_folder(tmp_path)), **RECIPE)
    if "shards" in kind:
        shards = write_shards(tmp_path)
        return configured(DataConfig, name=str(shards), streaming=streaming, shuffle_buffer=6, **RECIPE)
    on_the_hub(monkeypatch, tmp_path)
    return configured(DataConfig, name="imagenet-1k", streaming=streaming, shuffle_buffer=6, **RECIPE)


def on_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A hub that answers with local files."""
    write_shards(folder)
    files = {s: [f"file://{f}" for f in sorted(folder.glob(f"{s}-*"))] for s in ("train", "test")}
    splits = {"train": images_of("train", 24, False), "test": images_of("test", 9, False)}
    found = datasets.DatasetDict({name: as_dataset(images) for name, images in splits.items()})

    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(source, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


def train_batches(
    splits: Splits, config: DataConfig, rank: int = 0, world_size: int = 1, start: int = 0, seed: int = 3
) -> list[Batch]:
    loader = TrainLoader(splits.train, config, rank, world_size, seed)
    return list(islice(loader.batches(start), STEPS - start))


def changed(config: DataConfig, **settings: Any) -> DataConfig:
    return DataConfig(**{**vars(config), **settings})


def test_every_source_gives_the_same_images_labels_and_classes(config: DataConfig) -> None:
    """Grey, CMYK and RGBA images become RGB; sizes differ; what is no image by its name is passed over."""
    splits = load_splits(config)
    assert (splits.class_names, splits.in_channels) == (CLASSES, 3)
    assert splits.train.labels.tolist() == [row * 3 // 24 for row in range(24)]
    assert splits.test.labels.tolist() == [row * 3 // 9 for row in range(9)]
    for row, image in enumerate(splits.train.decode(range(24))):
        original = photograph(row)
        assert (image.size, image.mode) == (original.size, MODES[row % len(MODES)])


def test_evaluation_resizes_and_crops_as_torchvision_does(config: DataConfig) -> None:
    splits = load_splits(config)
    reference = v2.Compose([v2.PILToTensor(), v2.Resize(20, antialias=True), v2.CenterCrop(16)])
    originals = splits.test.decode(range(9))
    expected = torch.stack([reference(image.convert("RGB")) for image in originals])
    (batch,) = EvalLoader(splits.test, config)
    assert torch.equal(batch.images, expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_batches_laid_end_to_end_are_those_of_one_process(
    config: DataConfig, world_size: int
) -> None:
    splits = load_splits(config)
    alone = train_batches(splits, config)
    ranks = [train_batches(splits, config, rank, world_size) for rank in range(world_size)]
    together = [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_equal(together, alone)


def test_worker_processes_change_nothing(config: DataConfig) -> None:
    splits = load_splits(config)
    assert_equal(train_batches(splits, changed(config, num_workers=2)), train_batches(splits, config))


def test_any_step_can_be_the_first(config: DataConfig) -> None:
    splits = load_splits(config)
    assert_equal(train_batches(splits, config, start=4), train_batches(splits, config)[4:])


def test_an_epoch_reads_every_image_once_and_the_next_in_another_order(config: DataConfig) -> None:
    plain = changed(config, train_crop="pad", random_flip=False)
    splits = load_splits(plain)
    batches = train_batches(splits, plain)
    epochs = [
        [image.numpy().tobytes() for batch in batches[i : i + 3] for image in batch.images] for i in (0, 3)
    ]
    everything = TrainLoader(splits.train, plain).images.gather(torch.arange(24))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(image.numpy().tobytes() for image in everything)
    assert epochs[0] != epochs[1]


def test_held_out_images_and_limits_are_those_of_every_source(config: DataConfig, tmp_path: Path) -> None:
    limited = {"validation": 0.25, "limit": 10}
    splits = load_splits(changed(config, **limited))
    folder = write_folder(tmp_path / "again")
    expected = load_splits(configured(DataConfig, name=str(folder), **RECIPE, **limited))
    assert splits.validation is not None
    assert expected.validation is not None
    for split, other in ((splits.train, expected.train), (splits.validation, expected.validation)):
        assert torch.equal(split.labels, other.labels)
        images, others = (s.decode(range(len(s))) for s in (split, other))
        assert [i.tobytes() for i in images] == [i.tobytes() for i in others]


# What streaming alone promises


def stream(folder: Path, window: int = 6, **sizes: int) -> ParquetStream:
    write_shards(folder, **sizes)
    return ParquetStream([str(file) for file in sorted(folder.glob("train-*"))], window, "image")


def test_the_order_of_a_stream_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    rows = stream(tmp_path)
    assert torch.equal(rows.order(1, 2), stream(tmp_path).order(1, 2))
    orders = {tuple(rows.order(seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(24)) for order in orders)


def test_a_window_holds_the_rows_of_neighbouring_row_groups_only(tmp_path: Path) -> None:
    """Nine row groups of three rows: a window of six rows is two of them, shuffled; the last has one."""
    windows = stream(tmp_path, train=27).order(0, 0).split(6)
    groups = [sorted(set((window // 3).tolist())) for window in windows]
    assert [len(found) for found in groups] == [2, 2, 2, 2, 1]
    assert sorted(group for found in groups for group in found) == list(range(9))
    assert groups != [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_each_row_group_is_read_once_in_an_epoch_and_few_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stream(tmp_path, train=27)
    reads: list[int] = []
    read = source.ParquetStream._read_group

    def counting(self: ParquetStream, group: int) -> Any:
        if group not in self._cache:
            reads.append(group)
        found = read(self, group)
        assert sum(map(len, self._cache.values())) <= 6 + 2 * 3
        return found

    monkeypatch.setattr(ParquetStream, "_read_group", counting)
    order = rows.order(0, 0).tolist()
    for start in range(0, 27, 4):
        rows.images(order[start : start + 4])
    assert sorted(reads) == list(range(9))


def test_a_stream_reads_no_image_before_it_is_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stream(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(ParquetStream, "_read_group", refuse)
    assert (len(rows), rows.column_names) == (24, ["image", "label"])
    assert rows.column("label").to_pylist() == [row * 3 // 24 for row in range(24)]


def test_a_hub_data_set_of_other_files_cannot_be_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train": ["hf://datasets/someone/pictures/train.tar"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(source, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    with pytest.raises(ValueError, match=r"not stored as parquet files; set data\.streaming to false"):
        load_splits(DataConfig(name="someone/pictures", streaming=True))


def test_files_with_other_columns_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    other = as_dataset(images_of("train", 3, False)).rename_column("label", "class")
    other.to_parquet(tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.parquet has other columns"):
        load_splits(DataConfig(name=str(tmp_path), streaming=True))


def test_a_stream_of_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "train-00002-of-00003.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-00002-of-00003\.parquet cannot be read as a parquet file"):
        load_splits(DataConfig(name=str(tmp_path), streaming=True))


def test_a_stream_refuses_a_column_that_holds_no_images(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"set data\.columns"):
        load_splits(DataConfig(name=str(tmp_path), streaming=True, columns=["label", "label"]))


def test_an_image_set_of_mixed_sizes_needs_a_size_for_a_random_part() -> None:
    with pytest.raises(ValueError, match=r"needs data\.image_size"):
        DataConfig(train_crop="resized")
