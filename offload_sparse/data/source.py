"""A dataset's name resolved to its splits, through Hugging Face ``datasets``.

A name is, in this order: the embedded ``fashion_mnist_small``, a parquet file, a folder of parquet files
named after their splits, a folder of images (``<split>/<class>/<image>``), a dataset on the hub.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from offload_sparse.config import DataConfig
from offload_sparse.data.parquet import read_parquet, split_files, split_names
from offload_sparse.data.sampler import seed_of

EMBEDDED = "fashion_mnist_small"
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
_EMBEDDED_SPLITS = ("train", "test")
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B")
_MODE_SAMPLE = 256


@dataclass(frozen=True, eq=False)
class Split:
    """The images, still encoded, and labels of one split.

    Attributes:
        name: the split's name, for messages.
        table: dataset with the one column ``image``.
        labels: int64[N], class numbers.
        channels: channels to decode the images to: 1 if those of the training split are grey, else 3.
    """

    name: str
    table: datasets.Dataset
    labels: Tensor
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The images at ``indices``, decoded.

        Raises:
            ValueError: a row has no image, or one that cannot be decoded.
        """
        try:
            images = self.table[list(indices)]["image"]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if len(indices) > 1:
                for index in indices:  # find the one to name
                    self.read([index])
            reason = " ".join(str(error).split())
            raise ValueError(
                f"image {indices[0]} of split {self.name!r} cannot be decoded ({reason}); remove it or set "
                "data.image_column to a column of images"
            ) from error
        if None in images:
            raise ValueError(
                f"row {indices[images.index(None)]} of split {self.name!r} has no image; remove the row"
            )
        return images

    def image_shape(self, image_size: int) -> tuple[int, int]:
        """Height and width in pixels: ``image_size`` twice if it is not 0, else those of the first image."""
        if image_size:
            return image_size, image_size
        width, height = self.read([0])[0].size
        return height, width

    def select(self, indices: Tensor) -> Split:
        """The part of the split at ``indices`` int64[n]."""
        return Split(self.name, self.table.select(indices.numpy()), self.labels[indices], self.channels)


@dataclass(frozen=True)
class Splits:
    """What a run reads.

    Attributes:
        train: training images, without those held out for validation.
        test: images of the reported accuracy.
        validation: images of the accuracy shown while training, if there are any.
        class_names: names of the classes, by number.
        in_channels: channels of the images, 1 or 3.
        image_shape: their height and width in pixels (after ``data.image_size``).
    """

    train: Split
    test: Split
    validation: Split | None
    class_names: tuple[str, ...]
    in_channels: int
    image_shape: tuple[int, int]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_splits(config: DataConfig) -> Splits:
    """Read the splits that ``config`` names. What is held out and what the limits leave depends on no seed of
    the run.

    Raises:
        ValueError: no such dataset, file, split or column; unusable labels; no images left. One line, with
            advice.
    """
    names = [config.train_split, config.test_split] + (
        [config.validation_split] if config.validation_split else []
    )
    tables = _load_tables(config, list(dict.fromkeys(names)))
    class_names = _class_names(tables[config.train_split], config.train_split, config.label_column)
    splits = {name: _split(name, table, config, class_names) for name, table in tables.items()}
    channels = _channels(splits[config.train_split])
    splits = {name: replace(split, channels=channels) for name, split in splits.items()}
    train, test = splits[config.train_split], _limit(splits[config.test_split], config.test_limit)
    validation = splits[config.validation_split] if config.validation_split else None
    if validation is None and config.validation_size > 0:
        train, validation = _hold_out(train, config.validation_size)
    train = _limit(train, config.train_limit)
    return Splits(train, test, validation, class_names, channels, train.image_shape(config.image_size))


def _load_tables(config: DataConfig, names: list[str]) -> dict[str, datasets.Dataset]:
    """The asked-for splits by name, each with the image and label columns."""
    present, read = _resolve(config.name)
    tables: dict[str, datasets.Dataset] = {}
    for name in names:
        # A file on its own has no split name; it serves as the first one asked for, the training images.
        if present == [""] and name == names[0]:
            tables[name] = read("")
        elif name in present:
            tables[name] = read(name)
        else:
            raise ValueError(_missing_split(config.name, name, present))
        _check_columns(tables[name], config)
    return tables


def _resolve(name: str) -> tuple[list[str], Callable[[str], datasets.Dataset]]:
    """The names of the splits that are there, and a function that reads one of them."""
    if name == EMBEDDED:
        return list(_EMBEDDED_SPLITS), lambda split: read_parquet(
            [_EMBEDDED_FOLDER / f"{EMBEDDED}-{split}.parquet"]
        )
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return [""], lambda _: read_parquet([path])
    if path.is_dir() and any(path.glob("*.parquet")):
        return split_names(path), lambda split: read_parquet(split_files(path, split))
    if path.is_dir():
        present = sorted(
            entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        return present, lambda split: _read_image_folder(path / split)
    if path.is_file():
        raise ValueError(
            f"data.name {name!r} is a file, but not a parquet file; give a .parquet file or a folder"
        )
    if _looks_like_path(name):
        raise ValueError(
            f"data.name {name!r} does not exist; correct the path, or use the embedded {EMBEDDED}"
        )
    return _resolve_hub(name)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".parquet", "/")) or name.count("/") > 1


def _resolve_hub(name: str) -> tuple[list[str], Callable[[str], datasets.Dataset]]:
    unknown = f"unknown dataset {name!r}: there is no such file or folder, and"
    advice = f"correct data.name, or use the embedded {EMBEDDED}"
    if not _hub_answers():
        raise ValueError(
            f"{unknown} the hub cannot be reached (HF_HUB_OFFLINE=1 reads what is cached); {advice}"
        )
    try:
        found = datasets.load_dataset(name)
    except (
        Exception
    ) as error:  # the hub's client raises a dozen unrelated types, its HTTP library's own among them
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{unknown} the hub gives none ({type(error).__name__}: {reason}); {advice}"
        ) from error
    return sorted(str(split) for split in found), lambda split: found[split]


def _hub_answers() -> bool:
    """Whether it makes sense to ask the hub, whose client would retry for half a minute on a machine without
    network."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or getproxies():
        return True  # the cache answers, or the proxy resolves the address
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def _read_image_folder(folder: Path) -> datasets.Dataset:
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise ValueError(f"{folder} has no sub-folders; put its images into one sub-folder per class")
    # The table holds paths only, so it is kept in memory and leaves nothing in the library's cache.
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset(
                "imagefolder",
                data_files={"images": str(folder / "**")},
                split="images",
                cache_dir=cache,
                keep_in_memory=True,
                drop_labels=False,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{folder} holds no images in one sub-folder per class ({reason}); correct data.name"
            ) from error


def _missing_split(name: str, split: str, present: list[str]) -> str:
    if present == [""]:
        return (
            f"{name!r} is a single file and has no split {split!r}; give a folder that holds train*.parquet "
            "and test*.parquet"
        )
    return (
        f"dataset {name!r} has no split {split!r}, only {', '.join(present) or 'an empty folder'}; set "
        "data.train_split, data.test_split or data.validation_split"
    )


def _check_columns(table: datasets.Dataset, config: DataConfig) -> None:
    present = ", ".join(table.column_names)
    for setting, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column not in table.column_names:
            raise ValueError(
                f"dataset {config.name!r} has no column {column!r}, only {present}; set data.{setting}"
            )
    if len(table) == 0:
        raise ValueError(f"dataset {config.name!r} has a split without rows; give one with images")


def _values(table: datasets.Dataset, column: str) -> pa.ChunkedArray:
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        raise ValueError(f"column {column!r} has {values.null_count} rows without a label; remove them")
    return values


def _class_names(table: datasets.Dataset, split: str, column: str) -> tuple[str, ...]:
    """The names of the classes by number, from the training split."""
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = _values(table, column)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return tuple(sorted(values.unique().to_pylist()))
    if pa.types.is_integer(values.type):
        return tuple(str(number) for number in range(int(values.to_numpy().max()) + 1))
    raise ValueError(
        f"column {column!r} of split {split!r} holds {values.type}, not class labels; set data.label_column "
        "to a column of integers or names"
    )


def _labels(table: datasets.Dataset, split: str, column: str, class_names: tuple[str, ...]) -> Tensor:
    """int64[N]: the number of each row's class."""
    feature = table.features[column]
    values = _values(table, column).to_pylist()
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != class_names:
        # Each split of an image folder numbers the classes that it holds.
        values = [feature.names[value] if value >= 0 else None for value in values]
    number_of: dict[Any, int] = {name: number for number, name in enumerate(class_names)}
    numbers = torch.tensor(
        [value if isinstance(value, int) else number_of.get(value, -1) for value in values], dtype=torch.int64
    )
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(class_names):
        raise ValueError(
            f"split {split!r} has labels outside the {len(class_names)} classes of the training split; "
            "choose another split or data.label_column"
        )
    return numbers


def _image_column(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """The one column ``image``, decoded by PIL on access, whatever form the bytes are stored in."""
    table = table.select_columns([column])
    if column != "image":
        table = table.rename_column(column, "image")
    if isinstance(table.features["image"], datasets.Image) and table.features["image"].decode:
        return table
    try:
        return table.cast_column("image", datasets.Image())
    except (TypeError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"column {column!r} holds {table.features['image']}, not images; set data.image_column to a "
            "column of images or their bytes"
        ) from error


def _channels(split: Split) -> int:
    """1 if evenly spaced images are all grey, else 3."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(_MODE_SAMPLE, len(split))).round().astype(int))
    return 1 if {image.mode for image in split.read(rows.tolist())} <= set(_GREY_MODES) else 3


def _split(name: str, table: datasets.Dataset, config: DataConfig, class_names: tuple[str, ...]) -> Split:
    labels = _labels(table, name, config.label_column, class_names)
    return Split(name, _image_column(table, config.image_column), labels)


def _shuffled(size: int, purpose: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(purpose)))


def _hold_out(train: Split, share: float) -> tuple[Split, Split]:
    """Training and validation images: the last ``share`` of a permutation is held out, at least one image."""
    size = len(train)
    held = min(size - 1, max(1, round(share * size)))
    if held == 0:
        raise ValueError("data.validation_size cannot be taken from a single training image; set it to 0")
    order = _shuffled(size, 1)
    return train.select(order[: size - held].sort().values), train.select(order[size - held :].sort().values)


def _limit(split: Split, limit: int) -> Split:
    """At most ``limit`` images (0: all), a random subset in the split's order, the same for every run."""
    if limit == 0 or limit >= len(split):
        return split
    return split.select(_shuffled(len(split), 2)[:limit].sort().values)
