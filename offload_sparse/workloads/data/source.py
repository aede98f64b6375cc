"""A dataset's name resolved to its splits, through Hugging Face ``datasets``.

A name is, in this order: the embedded ``fashion_mnist_small``, a parquet file, a folder of parquet files
named after their splits, a folder of images (``<split>/<class>/<image>``), a dataset on the hub.
"""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.folder import read_image_folder
from offload_sparse.workloads.data.order import seed_of
from offload_sparse.workloads.data.parquet import read_parquet, split_files, split_names
from offload_sparse.workloads.data.stream import ParquetStream, hub_files

EMBEDDED = "fashion_mnist_small"
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
_EMBEDDED_SPLITS = ("train", "test")
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B")
_SAMPLE = 256
_DECODER = datasets.Image()
_STORED_TYPES = ("binary", "large_binary", "string", "large_string")


Table: TypeAlias = datasets.Dataset | ParquetStream

# What broken files make the decoders of Pillow raise.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True, eq=False)
class Split:
    """The images, still encoded, and labels of one split.

    Attributes:
        name: the split's name, for messages.
        table: dataset whose one column ``image`` is decoded by ``decode``, or parquet files to stream.
        labels: int64[N], class numbers.
        channels: channels to decode the images to: 1 if those of the training split are grey, else 3.
    """

    name: str
    table: Table
    labels: Tensor
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, indices: Sequence[int]) -> list[Image.Image | str]:
        """The images at ``indices``, decoded; in the place of one that cannot be, the reason in one line."""
        if isinstance(self.table, ParquetStream):
            stored = self.table.images(indices)
        else:
            stored = self.table[list(indices)]["image"]
        return [_decoded(image) for image in stored]

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The images at ``indices``, decoded.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        images = self.decode(indices)
        for index, image in zip(indices, images, strict=True):
            if isinstance(image, str):
                raise ValueError(self._undecodable(index, image))
        return [image for image in images if not isinstance(image, str)]

    def sample(self, corrupt_limit: int) -> list[Image.Image]:
        """Evenly spaced images; up to ``corrupt_limit`` that cannot be decoded are passed over.

        Raises:
            ValueError: more than that cannot be decoded, or none can.
        """
        rows = np.linspace(0, len(self) - 1, min(_SAMPLE, len(self))).round().astype(int)
        indices = np.unique(rows).tolist()
        images = self.decode(indices)
        bad = [n for n, image in enumerate(images) if isinstance(image, str)]
        if len(bad) > corrupt_limit or len(bad) == len(images):
            raise ValueError(self._undecodable(indices[bad[0]], str(images[bad[0]])))
        return [image for image in images if not isinstance(image, str)]

    def _undecodable(self, index: int, reason: str) -> str:
        return (
            f"image {index} of split {self.name!r} cannot be decoded ({reason}); remove it or set "
            "data.image_column to a column of images"
        )

    def image_shape(self, image_size: int) -> tuple[int, int]:
        """Height and width in pixels: ``image_size`` twice if it is not 0, else those of the first image that
        can be decoded."""
        if image_size:
            return image_size, image_size
        for index in range(len(self)):
            (image,) = self.decode([index])
            if not isinstance(image, str):
                return image.height, image.width
        raise ValueError(f"no image of split {self.name!r} can be decoded; set data.image_column")

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
    channels = _channels(splits[config.train_split], config.corrupt_limit)
    splits = {name: replace(split, channels=channels) for name, split in splits.items()}
    train, test = splits[config.train_split], _limit(splits[config.test_split], config.limit)
    validation = splits[config.validation_split] if config.validation_split else None
    if validation is None and config.validation_size > 0:
        train, validation = _hold_out(train, config.validation_size)
    train = _limit(train, config.limit)
    return Splits(train, test, validation, class_names, channels, train.image_shape(config.image_size))


def _load_tables(config: DataConfig, names: list[str]) -> dict[str, Table]:
    """The asked-for splits by name, each with the image and label columns."""
    present, read = _resolve(config)
    tables: dict[str, Table] = {}
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


def _resolve(config: DataConfig) -> tuple[list[str], Callable[[str], Table]]:
    """The names of the splits that are there, and a function that reads one of them."""
    name, path = config.name, Path(config.name).expanduser()
    if name == EMBEDDED:
        return list(_EMBEDDED_SPLITS), lambda split: _read_parquet(
            [_EMBEDDED_FOLDER / f"{EMBEDDED}-{split}.parquet"], config
        )
    if path.is_file() and path.suffix == ".parquet":
        return [""], lambda _: _read_parquet([path], config)
    if path.is_dir() and any(path.glob("*.parquet")):
        return split_names(path), lambda split: _read_parquet(split_files(path, split), config)
    if path.is_dir():
        present = sorted(
            entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        return present, lambda split: read_image_folder(path / split)
    if path.is_file():
        raise ValueError(
            f"data.name {name!r} is a file, but not a parquet file; give a .parquet file or a folder"
        )
    if _looks_like_path(name):
        raise ValueError(
            f"data.name {name!r} does not exist; correct the path, or use the embedded {EMBEDDED}"
        )
    return _resolve_hub(config)


def _read_parquet(files: list[Path], config: DataConfig) -> Table:
    if config.streaming:
        return ParquetStream([str(file) for file in files], config.shuffle_buffer)
    return read_parquet(files)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".parquet", "/")) or name.count("/") > 1


def _resolve_hub(config: DataConfig) -> tuple[list[str], Callable[[str], Table]]:
    name = config.name
    unknown = f"unknown dataset {name!r}: there is no such file or folder, and"
    advice = f"correct data.name, or use the embedded {EMBEDDED}"
    if not _hub_answers():
        raise ValueError(
            f"{unknown} the hub cannot be reached (HF_HUB_OFFLINE=1 reads what is cached); {advice}"
        )
    try:
        found = hub_files(name) if config.streaming else datasets.load_dataset(name)
    except (
        Exception
    ) as error:  # the hub's client raises a dozen unrelated types, its HTTP library's own among them
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{unknown} the hub gives none ({type(error).__name__}: {reason}); {advice}"
        ) from error
    present = sorted(str(split) for split in found)
    if config.streaming:
        return present, lambda split: ParquetStream(found[split], config.shuffle_buffer)
    return present, lambda split: found[split]


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


def _missing_split(name: str, split: str, present: list[str]) -> str:
    if present == [""]:
        return (
            f"{name!r} is a single file and has no split {split!r}; give a folder that holds train*.parquet "
            "and test*.parquet"
        )
    return (
        f"dataset {name!r} has no split {split!r}, only {', '.join(present) or 'an empty folder'}; set "
        "data.splits or data.validation"
    )


def _check_columns(table: Table, config: DataConfig) -> None:
    present = ", ".join(table.column_names)
    for setting, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column not in table.column_names:
            raise ValueError(
                f"dataset {config.name!r} has no column {column!r}, only {present}; set data.{setting}"
            )
    if len(table) == 0:
        raise ValueError(f"dataset {config.name!r} has a split without rows; give one with images")


def _values(table: Table, column: str) -> pa.ChunkedArray:
    if isinstance(table, ParquetStream):
        values = table.column(column)
    else:
        values = table.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        raise ValueError(f"column {column!r} has {values.null_count} rows without a label; remove them")
    return values


def _class_names(table: Table, split: str, column: str) -> tuple[str, ...]:
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


def _labels(table: Table, split: str, column: str, class_names: tuple[str, ...]) -> Tensor:
    """int64[N]: the number of each row's class."""
    feature = table.features[column]
    values = _values(table, column)
    if pa.types.is_integer(values.type):
        numbers = torch.from_numpy(values.to_numpy().astype(np.int64))
    else:
        numbers = _positions(values, class_names)
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != class_names:
        # Each split of an image folder numbers the classes that it holds.
        renumbered = _positions(pa.chunked_array([pa.array(feature.names)]), class_names)
        numbers = torch.where(numbers >= 0, renumbered[numbers.clamp_min(0)], -1)
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(class_names):
        raise ValueError(
            f"split {split!r} has labels outside the {len(class_names)} classes of the training split; "
            "choose another split or data.label_column"
        )
    return numbers


def _positions(values: pa.ChunkedArray, class_names: tuple[str, ...]) -> Tensor:
    """int64[N]: where each value stands among the class names, -1 for others."""
    found = pc.index_in(values, value_set=pa.array(class_names, type=values.type))
    return torch.from_numpy(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def _image_column(table: Table, column: str) -> Table:
    """The one column ``image``, decoded by PIL on access, whatever form the bytes are stored in."""
    feature = table.features[column]
    if isinstance(table, ParquetStream):
        if isinstance(feature, datasets.Image | dict) or feature.dtype in _STORED_TYPES:
            return table.with_image_column(column)
        raise ValueError(_no_images(column, feature))
    table = table.select_columns([column])
    if column != "image":
        table = table.rename_column(column, "image")
    try:
        return table.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(_no_images(column, feature)) from error


def _no_images(column: str, feature: Any) -> str:
    return (
        f"column {column!r} holds {feature}, not images; set data.image_column to a column of images or "
        "their bytes"
    )


def _decoded(stored: dict[str, Any] | None) -> Image.Image | str:
    """A stored image decoded, or why it cannot be."""
    if stored is None:
        return "the row has no image"
    try:
        return _DECODER.decode_example(stored)
    except _DECODING_ERRORS as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _channels(split: Split, corrupt_limit: int) -> int:
    """1 if evenly spaced images are all grey, else 3."""
    return 1 if {image.mode for image in split.sample(corrupt_limit)} <= set(_GREY_MODES) else 3


def _split(name: str, table: Table, config: DataConfig, class_names: tuple[str, ...]) -> Split:
    labels = _labels(table, name, config.label_column, class_names)
    return Split(name, _image_column(table, config.image_column), labels)


def _shuffled(size: int, purpose: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(purpose)))


def _hold_out(train: Split, share: float) -> tuple[Split, Split]:
    """Training and validation images: the last ``share`` of a permutation is held out, at least one image."""
    size = len(train)
    held = min(size - 1, max(1, round(share * size)))
    if held == 0:
        raise ValueError("data.validation cannot be taken from a single training image; leave it empty")
    order = _shuffled(size, 1)
    return train.select(order[: size - held].sort().values), train.select(order[size - held :].sort().values)


def _limit(split: Split, limit: int) -> Split:
    """At most ``limit`` images (0: all), a random subset in the split's order, the same for every run."""
    if limit == 0 or limit >= len(split):
        return split
    return split.select(_shuffled(len(split), 2)[:limit].sort().values)
