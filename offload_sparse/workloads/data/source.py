"""A data set's name resolved to its splits, through Hugging Face ``datasets``.

A name is, in this order: the embedded ``fashion_mnist_small``; a parquet file, a tar shard or a listing (CSV,
JSON lines); a folder of such files named after their splits; a folder of images (``<split>/<class>/<image>``
or ``<class>/<image>``); a data set on the hub.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub.constants
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from offload_sparse.channels.require import Explained
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.decode import GREY_MODES, Stored, UndecodableError, decode, stored_image
from offload_sparse.workloads.data.folder import (
    LISTINGS,
    class_folders,
    halves,
    read_image_folder,
    read_listing,
    read_tar,
)
from offload_sparse.workloads.data.labels import (
    Labels,
    class_names,
    class_numbers,
    read_class_map,
    read_labels,
)
from offload_sparse.workloads.data.order import seed_of
from offload_sparse.workloads.data.parquet import (
    ParquetStream,
    hub_files,
    read_parquet,
    split_files,
    split_names,
)

EMBEDDED = "fashion_mnist_small"
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
_SAMPLE = 256
_LONGEST_LIST = 60
_STORED_TYPES = ("binary", "large_binary", "string", "large_string")

_ALSO_CALLED = {
    "train": ("training",),
    "test": ("testing", "val", "valid", "validation"),
    "validation": ("val", "valid"),
    "valid": ("val", "validation"),
    "val": ("valid", "validation"),
}

Purpose = Literal["train", "test", "validation"]
Table: TypeAlias = datasets.Dataset | ParquetStream
_Source: TypeAlias = tuple[list[str], Callable[[str], Table]]
"""The names of the splits that are there, and a function that reads one of them."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images, still encoded, and labels of one split.

    Attributes:
        table: its images, in the column ``image``, or parquet files to stream.
        labels: int64[N], class numbers.
        channels: channels to decode the images to: 1 if those of the training split are grey, else 3."""

    name: str
    table: Table
    labels: Tensor
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, indices: Sequence[int]) -> list[Stored]:
        """The images at ``indices``, encoded."""
        if isinstance(self.table, ParquetStream):
            return self.table.images(indices)
        return [stored_image(value) for value in self.table[list(indices)]["image"]]

    def decode(self, indices: Sequence[int]) -> list[Image.Image | str]:
        """The images at ``indices``, decoded; in the place of one that cannot be, the reason in one line."""
        return [_or_reason(stored) for stored in self.stored(indices)]

    def sample(self, corrupt_limit: int) -> list[Image.Image]:
        """Evenly spaced images; up to ``corrupt_limit`` that cannot be decoded are passed over. Raises
        ValueError: more than that cannot be decoded, or none can."""
        rows = np.linspace(0, len(self) - 1, min(_SAMPLE, len(self))).round().astype(int)
        indices = np.unique(rows).tolist()
        images = self.decode(indices)
        bad = [n for n, image in enumerate(images) if isinstance(image, str)]
        if len(bad) > corrupt_limit or len(bad) == len(images):
            raise ValueError(
                f"image {indices[bad[0]]} of split {self.name!r} cannot be decoded ({images[bad[0]]}); "
                "remove it or set data.columns to a column of images"
            )
        return [image for image in images if not isinstance(image, str)]

    def image_shape(self, image_size: int) -> tuple[int, int]:
        """Height and width in pixels: ``image_size`` twice if it is not 0, else those of the first image that
        can be decoded."""
        if image_size:
            return image_size, image_size
        for index in range(len(self)):
            (image,) = self.decode([index])
            if not isinstance(image, str):
                return image.height, image.width
        raise ValueError(f"no image of split {self.name!r} can be decoded; set data.columns")

    def select(self, indices: Tensor) -> Split:
        """The part of the split at ``indices`` int64[n]."""
        return Split(self.name, self.table.select(indices.numpy()), self.labels[indices], self.channels)


@dataclass(frozen=True)
class Splits:
    """What a run reads.

    Attributes:
        train: training images, without those held out for validation.
        validation: images of the accuracy shown while training, if there are any.
        image_shape: their height and width in pixels (after ``data.image_size``).
        stored_as: modes and sizes of a sample of the training images as they are stored, for people."""

    train: Split
    test: Split
    validation: Split | None
    class_names: tuple[str, ...]
    in_channels: int
    image_shape: tuple[int, int]
    stored_as: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def parts(self) -> dict[str, Split]:
        """Those that are there, by purpose."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def counts(self) -> str:
        """How many images there are for each purpose, in words."""
        return ", ".join(f"{len(part):,} {name}" for name, part in self.parts().items())

    def identity(self) -> str:
        """What is the same as long as these are the same images, wherever they lie: the classes, and how many
        images there are of each, in which order. A few words for people, with a digest."""
        digest = hashlib.blake2b(json.dumps(self.class_names).encode(), digest_size=8)
        for name, part in self.parts().items():
            digest.update(f"{name} {len(part)}".encode() + part.labels.numpy().tobytes())
        classes = f"{self.num_classes} classes: {listed(self.class_names)}"
        return f"{self.counts} images of {classes} ({digest.hexdigest()})"

    def describe(self) -> list[str]:
        """What there is to train on, in lines of at most 98 columns."""
        counted = [f"{name} {_counted(part, self.num_classes)}" for name, part in self.parts().items()]
        height, width = self.image_shape
        return [
            f"{self.num_classes} classes: {listed(self.class_names)}",
            f"images (of a class): {', '.join(counted)}",
            f"read as {height}×{width} pixels, {self.in_channels} channel(s); stored as {self.stored_as}",
        ]


def load_splits(config: DataConfig) -> Splits:
    """Read the splits that ``config`` names. What is held out and what the limits leave depends on no seed of
    the run. Raises ValueError: no such dataset, file, split or column; unusable labels; no images left. One
    line, with advice."""
    splits, classes = _numbered(config, _names(config))
    sample = splits[config.splits[0]].sample(config.corrupt_limit)
    channels = 1 if {image.mode for image in sample} <= set(GREY_MODES) else 3
    splits = {name: replace(split, channels=channels) for name, split in splits.items()}
    train = _part(config, "train", splits[config.splits[0]])
    test = _part(config, "test", splits[config.splits[1]])
    held = _name(config, "validation")
    validation = _part(config, "validation", splits[held]) if held else None
    shape = train.image_shape(config.image_size)
    for other in (split for split in (test, validation) if split is not None):
        if (found := other.image_shape(config.image_size)) != shape:
            raise ValueError(
                f"the images of split {other.name!r} have {found[0]}×{found[1]} pixels, those of "
                f"{train.name!r} {shape[0]}×{shape[1]}; set data.image_size"
            )
    return Splits(train, test, validation, classes, channels, shape, _stored_as(sample))


def load_split(
    config: DataConfig, purpose: Purpose, classes: Sequence[str], channels: int
) -> Split | None:
    """One of the splits that ``load_splits`` gives, for a network: with the classes numbered as in its
    ``classes``, decoded to its ``channels``; no other split has to be there. None for validation images where
    there are none. Raises ValueError: as ``load_splits``."""
    if not (name := _name(config, purpose)):
        return None
    splits, _ = _numbered(config, [name], classes)
    return _part(config, purpose, replace(splits[name], channels=channels))


def listed(names: Sequence[str]) -> str:
    """The names of classes, the first and the last of many."""
    text = ", ".join(names)
    if len(text) <= _LONGEST_LIST:
        return text
    return f"{text[:_LONGEST_LIST].rpartition(', ')[0]}, … {names[-1][:20]}"


def _name(config: DataConfig, purpose: Purpose) -> str:
    """The name of the split that images of a purpose are in; empty if there are none for validation."""
    train, test = config.splits
    held_out = train if config.validation_size else ""
    return {"train": train, "test": test, "validation": config.validation_split or held_out}[purpose]


def _names(config: DataConfig) -> list[str]:
    """The names of all splits that are configured; the first is that of the training images."""
    return list(filter(None, dict.fromkeys([*config.splits, _name(config, "validation")])))


def _numbered(
    config: DataConfig, names: list[str], classes: Sequence[str] = ()
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The asked-for splits by name, with the classes that they are numbered by: ``classes``, which a network
    knows, else those of the first split."""
    tables = _load_tables(config, names)
    class_map = read_class_map(config.class_map) if config.class_map else {}
    labels = {name: _labels(table, name, config.label_column) for name, table in tables.items()}
    whose = "the network" if classes else "the training split"
    classes = tuple(classes) or class_names(labels[names[0]], class_map)
    numbers = {name: class_numbers(found, name, classes, class_map, whose) for name, found in labels.items()}
    images = {name: _image_column(table, config.image_column) for name, table in tables.items()}
    return {name: Split(name, images[name], numbers[name]) for name in tables}, classes


def _load_tables(config: DataConfig, names: list[str]) -> dict[str, Table]:
    """The asked-for splits by name, each with the image and label columns."""
    present, read = _resolve(config, names[0])
    tables: dict[str, Table] = {}
    taken = set[str]()
    for name in names:
        # A file on its own has no split name; it serves as the first one asked for, the training images.
        found = "" if present == [""] and name == names[0] else _called(name, present, _names(config))
        if found is None or found in taken:  # two names never mean the same images
            raise ValueError(_missing_split(config.name, name, present))
        taken.add(found)
        tables[name] = read(found)
        _check_columns(tables[name], config)
    return tables


def _called(name: str, present: Sequence[str], wanted: Sequence[str] = ()) -> str | None:
    """The split that is meant by ``name``, whatever its capitals, and is not meant by another name."""
    others = [other for other in wanted if other != name]
    usual = [also for also in _ALSO_CALLED.get(name, ()) if also not in others]
    known = {called.lower(): called for called in present} | {called: called for called in present}
    return next((known[called] for called in (name, *usual) if called in known), None)


def _resolve(config: DataConfig, first: str) -> _Source:
    """Where the splits are, of which ``first`` is wanted in any case."""
    name, path = config.name, Path(config.name).expanduser()
    if name == EMBEDDED:
        return ["test", "train"], lambda split: _read_files(
            [_EMBEDDED_FOLDER / f"{EMBEDDED}-{split}.parquet"], config
        )
    if path.is_file() and path.suffix in LISTINGS:
        return _in_parts(read_listing([path], config.columns), config)
    if path.is_file() and path.suffix in (".parquet", ".tar"):
        return [""], lambda _: _read_files([path], config)
    if path.is_dir():
        return _resolve_folder(path, config, first)
    if path.exists():
        raise ValueError(
            f"data.name {name!r} is a file, but not a parquet file, a tar shard or a listing; give one of "
            "these, or a folder"
        )
    if _looks_like_path(name):
        raise ValueError(
            f"data.name {name!r} does not exist; correct the path, or use the embedded {EMBEDDED}"
        )
    return _resolve_hub(config)


def _resolve_folder(path: Path, config: DataConfig, first: str) -> _Source:
    folders = class_folders(path)
    for suffix in (".parquet", ".tar", *LISTINGS):
        present = split_names(path, suffix)  # of files beside folders, only those are meant that say so
        if present and (not folders or _called(first, present)):
            return present, lambda split, suffix=suffix: _read_files(split_files(path, split, suffix), config)
    present = folders
    usual = {*config.splits, *_ALSO_CALLED, *sum(_ALSO_CALLED.values(), ())}
    if len(set(present) - usual) > 1 and not any(
        class_folders(path / name) for name in present if {name, name.lower()} & usual
    ):
        return _in_parts(read_image_folder(path), config)
    return present, lambda split: _named(read_image_folder(path / split), config)


def _in_parts(table: datasets.Dataset, config: DataConfig) -> _Source:
    """A table for all splits: as its column ``split`` says, else one in five of each class is for testing."""
    if "split" in table.column_names:
        of = np.asarray(table["split"]).astype(str)
        parts = {str(name): table.select(np.flatnonzero(of == name)) for name in np.unique(of)}
    else:
        parts = halves(table)
    return sorted(parts), lambda split: _named(parts[split], config)


def _named(table: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Columns ``image`` and ``label`` called as the configuration calls them."""
    return table.rename_columns({"image": config.image_column, "label": config.label_column})


def _read_files(files: list[Path], config: DataConfig) -> Table:
    """The rows of the files of one split, one after the other."""
    for file in files:
        if not file.is_file():  # a pipe would be waited for, a device read for ever
            raise ValueError(f"{file} is no regular file; correct data.name")
    if files[0].suffix == ".tar":
        return _named(read_tar(files), config)
    if files[0].suffix in LISTINGS:
        return _named(read_listing(files, config.columns).select_columns(["image", "label"]), config)
    if config.streaming:
        return _stream([str(file) for file in files], config)
    return read_parquet(files)


def _stream(files: Sequence[str], config: DataConfig) -> ParquetStream:
    return ParquetStream(files, config.shuffle_buffer, config.image_column)


def _looks_like_path(name: str) -> bool:
    endings = (".parquet", ".tar", "/", *LISTINGS)
    return name.startswith((".", "/", "~")) or name.endswith(endings) or name.count("/") > 1


def _resolve_hub(config: DataConfig) -> _Source:
    name = config.name
    unknown = f"unknown dataset {name!r}: there is no such file or folder, and"
    advice = f"correct data.name, or use the embedded {EMBEDDED}"
    if not _hub_answers():
        raise ValueError(
            f"{unknown} the hub cannot be reached (HF_HUB_OFFLINE=1 reads what is cached); {advice}"
        )
    # Its client raises a dozen unrelated types of errors, its HTTP library's own among them.
    with Explained(f"{unknown} the hub gives none (", f"); {advice}"):
        found = hub_files(name) if config.streaming else datasets.load_dataset(name)
    present = sorted(str(split) for split in found)
    return present, lambda split: _stream(found[split], config) if config.streaming else found[split]


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
    if not present:
        return f"{name!r} is an empty folder; give one with images in <class>/ or <split>/<class>/"
    return (
        f"dataset {name!r} has no split {split!r}, only {', '.join(present)}; set data.splits or "
        "data.validation"
    )


def _check_columns(table: Table, config: DataConfig) -> None:
    present = ", ".join(table.column_names)
    for column in config.columns:
        if column not in table.column_names:
            raise ValueError(
                f"dataset {config.name!r} has no column {column!r}, only {present}; set data.columns"
            )
    if len(table) == 0:
        raise ValueError(f"dataset {config.name!r} has a split without rows; give one with images")


def _labels(table: Table, split: str, column: str) -> Labels:
    if isinstance(table, ParquetStream):
        values = table.column(column)
    else:
        values = table.select_columns([column]).with_format("arrow")[:].column(column)
    return read_labels(values, table.features[column], split, column)


def _image_column(table: Table, column: str) -> Table:
    """The one column ``image``, encoded, whatever form the bytes are stored in."""
    feature = table.features[column]
    known = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    if not known and getattr(feature, "dtype", None) not in _STORED_TYPES:
        raise ValueError(
            f"column {column!r} holds {feature}, not images; set data.columns to a column of images or "
            "their bytes"
        )
    if isinstance(table, ParquetStream):
        return table
    table = table.select_columns([column])
    if column != "image":
        table = table.rename_column(column, "image")
    if isinstance(feature, datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    return table


def _or_reason(stored: Stored) -> Image.Image | str:
    try:
        return decode(stored)
    except UndecodableError as error:
        return str(error)


def _stored_as(sample: Sequence[Image.Image]) -> str:
    """Modes and sizes, the most frequent first."""
    modes = Counter(str(image.info.get("mode", image.mode)) for image in sample)
    sizes = sorted({image.size for image in sample}, key=lambda size: size[0] * size[1])
    (width, height), (widest, highest) = sizes[0], sizes[-1]
    pixels = f"{height}×{width}" + (f" to {highest}×{widest}" if len(sizes) > 1 else "")
    return f"{', '.join(mode for mode, _ in modes.most_common())}, {pixels}"


def _counted(split: Split, classes: int) -> str:
    """How many images there are, and how many of a class."""
    counts = split.labels.bincount(minlength=classes)
    least, most = int(counts.min()), int(counts.max())
    return f"{len(split):,} ({least:,}{'' if least == most else f'-{most:,}'})"


def _shuffled(size: int, purpose: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(purpose)))


def _part(config: DataConfig, purpose: Purpose, split: Split) -> Split:
    """The images of a split that serve a purpose: without those that are held out of the training images for
    validation, the last ones of a permutation, or these; then as many as ``data.limit`` leaves."""
    if config.validation_size and purpose != "test":
        held = config.held_out(len(split))
        if held == 0:
            raise ValueError("data.validation cannot be taken from a single training image; leave it empty")
        trained, validated = _shuffled(len(split), 1).tensor_split([-held])
        split = split.select((validated if purpose == "validation" else trained).sort().values)
    return split if purpose == "validation" else _limit(split, config.limit)


def _limit(split: Split, limit: int) -> Split:
    """At most ``limit`` images (0: all), a random subset in the split's order, the same for every run."""
    if limit == 0 or limit >= len(split):
        return split
    return split.select(_shuffled(len(split), 2)[:limit].sort().values)
