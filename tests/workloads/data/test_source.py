"""Every form of a dataset's name, every layout, and every one-line error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data import parquet, source
from offload_sparse.workloads.data.loader import declared_data
from offload_sparse.workloads.data.source import Split, load_split, load_splits
from tests.support.constants import configured
from tests.workloads.data.images import parquet_folder, pixels, png, table, write_parquet

EMBEDDED_FOLDER = Path(source.__file__).parent / "embedded"


def message_of(**settings: Any) -> str:
    """The one line that ``load_splits`` refuses with."""
    with pytest.raises(ValueError) as caught:
        load_splits(configured(DataConfig, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arrays(split: Split) -> list[np.ndarray]:
    return [np.asarray(image) for image in split.decode(range(len(split)))]


def assert_same_images(split: Split, expected: list[Any]) -> None:
    assert all(np.array_equal(got, want) for got, want in zip(arrays(split), expected, strict=True))


# The embedded set


def test_what_the_embedded_set_holds() -> None:
    """12,000 and 2,000 grey images of 28 pixels, as many of each class."""
    splits = load_splits(DataConfig())
    assert torch.equal(splits.train.labels.bincount(), torch.full((10,), 1200))
    assert torch.equal(splits.test.labels.bincount(), torch.full((10,), 200))
    assert (splits.num_classes, splits.in_channels, splits.image_shape) == (10, 1, (28, 28))
    assert splits.class_names[0] == "T-shirt/top"
    assert splits.validation is None
    for split in (splits.train, splits.test):
        assert {(image.mode, image.size) for image in split.decode(range(len(split)))} == {("L", (28, 28))}


def test_no_test_image_of_the_embedded_set_is_a_training_image() -> None:
    splits = load_splits(DataConfig())
    train = {image.tobytes() for image in splits.train.decode(range(len(splits.train)))}
    assert not train & {image.tobytes() for image in splits.test.decode(range(len(splits.test)))}


def test_the_embedded_set_is_small_and_has_its_licence() -> None:
    """At most 8 megabytes."""
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= 8_000_000
    licence = (EMBEDDED_FOLDER / "LICENSE").read_text()
    assert "MIT" in licence
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "Fashion-MNIST" in (EMBEDDED_FOLDER / "SOURCE.md").read_text()


# Parquet


def test_a_folder_of_parquet_files_gives_its_splits(tmp_path: Path) -> None:
    splits = load_splits(DataConfig(name=str(parquet_folder(tmp_path, channels=3))))
    assert_same_images(splits.train, pixels(12, channels=3, seed=0))
    assert_same_images(splits.test, pixels(6, channels=3, seed=1))
    assert splits.train.labels.tolist() == [0, 1, 2] * 4
    assert (splits.class_names, splits.in_channels, splits.image_shape) == (("a", "b", "c"), 3, (8, 8))


def test_shards_are_read_in_their_order_and_validation_by_name(tmp_path: Path) -> None:
    images = pixels(9)
    for shard in range(3):
        part = table(images[3 * shard : 3 * shard + 3], [0, 1, 2], "abc")
        write_parquet(tmp_path / f"train-{shard:05d}-of-00003.parquet", part)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table(images[:2], [1, 0], "abc"))
    write_parquet(tmp_path / "validation.parquet", table(images[2:4], [2, 2], "abc"))
    splits = load_splits(DataConfig(name=str(tmp_path), validation="validation"))
    assert_same_images(splits.train, images)
    assert splits.test.labels.tolist() == [1, 0]
    assert splits.validation is not None
    assert splits.validation.labels.tolist() == [2, 2]


def test_an_exact_file_name_goes_first(tmp_path: Path) -> None:
    """Before names that only start with that of the split."""
    parquet_folder(tmp_path)
    write_parquet(tmp_path / "train_extra.parquet", table(pixels(5), [0] * 5, "abc"))
    assert len(load_splits(DataConfig(name=str(tmp_path))).train) == 12
    (tmp_path / "train.parquet").unlink()
    assert len(load_splits(DataConfig(name=str(tmp_path))).train) == 5


def test_other_split_and_column_names_can_be_given(tmp_path: Path) -> None:
    for split in ("fit", "check"):
        renamed = table(pixels(4), [0, 1, 1, 0]).rename_columns({"image": "img", "label": "fine_label"})
        write_parquet(tmp_path / f"{split}.parquet", renamed)
    config = DataConfig(
        name=str(tmp_path),
        splits=["fit", "check"],
        columns=["img", "fine_label"],
    )
    splits = load_splits(config)
    assert_same_images(splits.train, pixels(4))
    assert splits.num_classes == 2


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_images_may_be_a_plain_struct_or_plain_bytes(tmp_path: Path, form: str) -> None:
    encoded = [png(image) for image in pixels(4)]
    column = encoded if form == "bytes" else [{"bytes": data, "path": None} for data in encoded]
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": column, "label": [0, 1, 0, 1]})
        write_parquet(tmp_path / f"{split}.parquet", rows)
    assert_same_images(load_splits(DataConfig(name=str(tmp_path))).train, pixels(4))


def test_labels_may_be_names_which_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table(pixels(4), ["dog", "cat", "eel", "cat"]))
    write_parquet(tmp_path / "test.parquet", table(pixels(2), ["eel", "dog"]))
    splits = load_splits(DataConfig(name=str(tmp_path)))
    assert splits.class_names == ("cat", "dog", "eel")
    assert splits.train.labels.tolist() == [1, 0, 2, 0]
    assert splits.test.labels.tolist() == [2, 1]


def test_small_parquet_files_are_read_without_any_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **keywords: object) -> None:
        raise AssertionError("the library's cache must not be needed")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    parquet_folder(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(load_splits(DataConfig(name=str(tmp_path))).train) == 12
    assert sorted(tmp_path.rglob("*")) == before


def test_large_parquet_files_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they go through the library."""
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = parquet_folder(tmp_path / "files", channels=3)
    splits = load_splits(DataConfig(name=str(folder)))
    assert_same_images(splits.train, pixels(12, channels=3, seed=0))
    assert splits.class_names == ("a", "b", "c")
    assert (tmp_path / "cache").is_dir()


# Image folders


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """PNG and JPEG of several sizes; the test split holds two of the three classes."""
    folder = tmp_path / "pictures"
    for split, classes in (("train", ("ant", "bee", "cow")), ("test", ("ant", "cow"))):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for k, suffix in enumerate(("png", "jpg")):
                image = pixels(1, 10 + 2 * number, 12 + k, 3, seed=k)[0]
                Image.fromarray(image).save(folder / split / name / f"{k}.{suffix}")
    return folder


def test_an_image_folder_gives_splits_and_classes_by_its_sub_folders(image_folder: Path) -> None:
    splits = load_splits(DataConfig(name=str(image_folder), image_size=8))
    assert splits.class_names == ("ant", "bee", "cow")
    assert sorted(splits.train.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(splits.test.labels.tolist()) == [0, 0, 2, 2], "a class keeps its number in every split"
    assert (splits.in_channels, splits.image_shape) == (3, (8, 8))


def test_a_split_is_read_alone_with_the_classes_of_a_network(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "train")
    config = DataConfig(name=str(image_folder), image_size=8)
    split = load_split(config, "test", ("cow", "bee", "ant"), 3)
    assert split is not None
    heights = [image.shape[0] for image in arrays(split)]
    assert list(zip(heights, split.labels.tolist(), strict=True)) == [(10, 2), (10, 2), (12, 0), (12, 0)]
    with pytest.raises(ValueError, match="outside the 2 classes of the network, such as 'cow'"):
        load_split(config, "test", ("ant", "bee"), 3)


@pytest.mark.parametrize("validation", ["", "0.25", "test"])
def test_a_split_that_is_read_alone_is_the_one_of_all(validation: str, tmp_path: Path) -> None:
    name = str(parquet_folder(tmp_path))
    config = DataConfig(name=name, validation=validation, limit=5)
    splits = load_splits(config)
    for purpose in ("train", "test", "validation"):
        alone, expected = load_split(config, purpose, splits.class_names, 1), getattr(splits, purpose)
        assert (alone is None) == (expected is None)
        if alone is not None:
            assert torch.equal(alone.labels, expected.labels)
            assert_same_images(alone, arrays(expected))


def test_a_file_on_its_own_serves_as_the_split_that_is_read_alone(tmp_path: Path) -> None:
    classes = load_splits(DataConfig(name=str(parquet_folder(tmp_path)))).class_names
    split = load_split(DataConfig(name=str(tmp_path / "test.parquet")), "test", classes, 1)
    assert split is not None
    assert_same_images(split, pixels(6, seed=1))


def test_images_are_known_by_their_classes_and_labels_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here = parquet_folder(tmp_path / "here")
    there = Path(shutil.copytree(here, tmp_path / "there"))
    identity = load_splits(DataConfig(name=str(here))).identity()
    assert load_splits(DataConfig(name=str(there))).identity() == identity
    assert load_splits(DataConfig(name=str(there), limit=5)).identity() != identity
    shutil.copy(there / "train.parquet", there / "test.parquet")
    assert load_splits(DataConfig(name=str(there))).identity() != identity


def test_an_image_folder_without_the_split_names_what_is_there(image_folder: Path) -> None:
    assert "has no split 'validation', only test, train" in message_of(
        name=str(image_folder), splits=["train", "validation"]
    )


def test_a_split_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    assert "holds no images" in message_of(name=str(tmp_path))


def test_a_split_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.fromarray(pixels(1)[0]).save(tmp_path / "train" / "0.png")
    assert "one sub-folder per class" in message_of(name=str(tmp_path))


# The hub


def test_any_other_name_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict(
        train=table(pixels(4), [0, 1, 0, 1], "ab"), test=table(pixels(2), [0, 1], "ab")
    )
    asked: list[str] = []

    def load(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return found

    monkeypatch.setattr(source, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_splits(DataConfig(name="someone/pictures"))
    assert asked == ["someone/pictures"]
    assert_same_images(splits.train, pixels(4))


def test_a_name_that_the_hub_does_not_know_is_an_unknown_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(source, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    message = message_of(name="someone/pictures")
    assert "unknown dataset 'someone/pictures'" in message
    assert "fashion_mnist_small" in message


def test_without_a_network_an_unknown_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(source.socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(source, "getproxies", dict)
    monkeypatch.setattr(source.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = message_of(name="fashion_mnist_smal")
    assert "unknown dataset 'fashion_mnist_smal'" in message
    assert "HF_HUB_OFFLINE=1" in message


# Bad input


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "train.parquet", "a/b/c"]
)
def test_a_path_that_does_not_exist_is_named(name: str) -> None:
    message = message_of(name=name)
    assert repr(name) in message
    assert "does not exist" in message


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert "not a parquet file" in message_of(name=str(tmp_path / "images.zip"))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"this is no parquet file")
    assert "train.parquet cannot be read as a parquet file" in message_of(name=str(tmp_path))


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("columns", [["picture", "label"], ["image", "class"]])
def test_a_missing_column_is_answered_with_those_that_exist(
    tmp_path: Path, columns: list[str], single: bool
) -> None:
    folder = parquet_folder(tmp_path)
    name = folder / "train.parquet" if single else folder
    message = message_of(name=str(name), columns=columns)
    (missing,) = {*columns} - {"image", "label"}
    assert f"no column {missing!r}, only image, label" in message
    assert "data.columns" in message


def test_a_single_file_has_no_test_split(tmp_path: Path) -> None:
    message = message_of(name=str(parquet_folder(tmp_path) / "train.parquet"))
    assert "single file and has no split 'test'" in message
    assert "train*.parquet and test*.parquet" in message


def test_a_missing_split_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table(pixels(2), [0, 1]))
    write_parquet(tmp_path / "others-00000-of-00001.parquet", table(pixels(2), [0, 1]))
    message = message_of(name=str(tmp_path))
    assert "has no split 'test', only others, train" in message
    assert "data.splits" in message


@pytest.mark.parametrize(
    ("labels", "test_labels", "complaint"),
    [
        ([0.5, 1.5], [0.5, 0.5], "not class labels"),
        ([0, None], [0, 0], "without a label"),
        ([0, 1], [0, 2], "outside the 2 classes"),
        ([0, 1], [0, -1], "outside the 2 classes"),
        (["a", "b"], ["a", "z"], "outside the 2 classes"),
        ([0, -1], [0, 1], "outside the 2 classes"),
    ],
)
def test_unusable_labels_are_refused(
    tmp_path: Path, labels: list[Any], test_labels: list[Any], complaint: str
) -> None:
    write_parquet(tmp_path / "train.parquet", table(pixels(2), labels))
    write_parquet(tmp_path / "test.parquet", table(pixels(2), test_labels))
    assert complaint in message_of(name=str(tmp_path))


@pytest.mark.parametrize("validation", ["", "valid"])
def test_images_of_another_size_than_those_of_training_are_refused(validation: str, tmp_path: Path) -> None:
    """Unless all are brought to one size."""
    parquet_folder(tmp_path)
    other = validation or "test"
    write_parquet(tmp_path / f"{other}.parquet", table(pixels(6, 8, 12), [i % 3 for i in range(6)], "abc"))
    assert message_of(name=str(tmp_path), validation=validation) == (
        f"the images of split {other!r} have 8×12 pixels, those of 'train' 8×8; set data.image_size"
    )
    load_splits(DataConfig(name=str(tmp_path), validation=validation, image_size=8))


def test_a_column_that_holds_no_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": [1.5, 2.5], "label": [0, 1], "text": [b"no image"] * 2})
        write_parquet(tmp_path / f"{split}.parquet", rows)
    assert "data.columns" in message_of(name=str(tmp_path))
    message = message_of(name=str(tmp_path), columns=["text", "label"])
    assert "image 0 of split 'train' cannot be decoded" in message


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = {"image": [{"bytes": png(pixels(1)[0]), "path": None}, None], "label": [0, 1]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        write_parquet(tmp_path / f"{split}.parquet", datasets.Dataset.from_dict(rows, features=features))
    assert "image 1 of split 'train' cannot be decoded (the row has no image)" in message_of(
        name=str(tmp_path), corrupt_limit=0
    )


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table(pixels(2), [0, 1], "ab"))
    write_parquet(tmp_path / "test.parquet", table(pixels(2), [0, 1], "ab").select([]).flatten_indices())
    assert "without rows" in message_of(name=str(tmp_path))


# Held-out images and limits


def test_validation_size_holds_out_a_share_that_training_never_sees(tmp_path: Path) -> None:
    name = str(parquet_folder(tmp_path, train=40))
    whole = {image.tobytes() for image in pixels(40)}
    splits = load_splits(DataConfig(name=name, validation=0.25))
    assert splits.validation is not None
    train = {image.tobytes() for image in arrays(splits.train)}
    held = {image.tobytes() for image in arrays(splits.validation)}
    assert (len(train), len(held)) == (30, 10)
    assert train | held == whole


@pytest.mark.parametrize("validation", [0.001, 0.25, 0.999])
def test_a_plan_counts_the_images_that_training_is_left_with(validation: float, tmp_path: Path) -> None:
    declared = {"num_classes": 3, "channels": 1, "train_images": 12}
    folder = parquet_folder(tmp_path)
    config = DataConfig(name=str(folder), validation=validation, image_size=8, declared=declared)
    assert declared_data(config).train_images == len(load_splits(config).train)


def test_what_is_held_out_depends_neither_on_the_run_nor_on_the_limits(tmp_path: Path) -> None:
    name = str(parquet_folder(tmp_path, train=40))
    first = load_splits(DataConfig(name=name, validation=0.25))
    second = load_splits(DataConfig(name=name, validation=0.25, limit=7))
    assert first.validation is not None
    assert second.validation is not None
    assert_same_images(second.validation, arrays(first.validation))
    assert len(second.train) == 7
    assert {i.tobytes() for i in arrays(second.train)} <= {i.tobytes() for i in arrays(first.train)}


def test_limits_take_the_same_random_subset_each_time_with_its_labels(tmp_path: Path) -> None:
    config = DataConfig(name=str(parquet_folder(tmp_path, train=40, test=8)), limit=10)
    first, second = load_splits(config), load_splits(config)
    assert (len(first.train), len(first.test)) == (10, 8)
    assert_same_images(second.train, arrays(first.train))
    label_of = {image.tobytes(): i % 3 for i, image in enumerate(pixels(40))}
    assert [label_of[image.tobytes()] for image in arrays(first.train)] == first.train.labels.tolist()
    assert not all(np.array_equal(a, b) for a, b in zip(arrays(first.train), pixels(10), strict=True))


def test_a_limit_above_the_size_takes_all(tmp_path: Path) -> None:
    config = DataConfig(name=str(parquet_folder(tmp_path)), limit=99)
    assert_same_images(load_splits(config).train, pixels(12))
