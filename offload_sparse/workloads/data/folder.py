"""Images that lie in files: folders of one sub-folder per class, listings that name files, tar shards.

Of images in folders and listings nothing is opened, copied or cached here. File names are kept as the bytes
that they are; every real directory and file of a split is read once, however many links lead to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from datasets.table import InMemoryTable
from PIL import Image

from offload_sparse.channels.require import Explained
from offload_sparse.workloads.data.decode import FORMATS, text_of
from offload_sparse.workloads.data.order import mix

logger = logging.getLogger(__name__)

LISTINGS = (".csv", ".tsv", ".jsonl", ".json")
_PATH_COLUMNS = ("image", "path", "file_name", "file", "filename", "image_path")
_LABEL_COLUMNS = ("label", "class", "target", "category")
_HELD_OUT = 5
"""Where nothing says which images are for testing, one in so many of each class is."""

Image.init()
_ENDINGS = tuple(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def read_image_folder(folder: Path) -> datasets.Dataset:
    """Columns ``image`` and ``label`` of the images below ``folder/<class>/``, sorted by class and path.

    Files whose names do not end as those of images do are passed over. Raises ValueError: there are no
    sub-folders, or no images in them."""
    classes = class_folders(folder)
    if not classes:
        raise ValueError(f"{folder} has no sub-folders; put its images into one sub-folder per class")
    per_class = _image_paths(folder, classes)
    found = [(name, paths) for name, paths in zip(classes, per_class, strict=True) if paths]
    if not found:
        raise ValueError(f"{folder} holds no images in one sub-folder per class; correct data.name")
    labels = np.repeat(np.arange(len(found)), [len(paths) for _, paths in found])
    names = datasets.ClassLabel(names=[text_of(name) for name, _ in found])
    return _table([path for _, paths in found for path in paths], pa.array(labels), names)


def read_tar(files: Sequence[Path]) -> datasets.Dataset:
    """The rows of tar shards in the layout of webdataset: ``name.jpg`` beside ``name.cls`` (a number),
    ``.txt`` (a name) or ``.json`` (with a ``label``); of images alone, their folders are the classes.

    The library copies them once into its cache (``HF_DATASETS_CACHE``). Raises ValueError: a file cannot be
    read, or holds no images or labels."""
    try:
        table = datasets.load_dataset("webdataset", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # whatever the library's readers of tar, JSON, NumPy … raise
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(f"{files[0]} cannot be read as a tar shard ({reason}); correct data.name") from error
    image = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        present = ", ".join(table.column_names)
        raise ValueError(f"{files[0]} holds no images, only {present}; correct data.name")
    table = table.rename_column(image, "image")
    label = next((name for name in ("cls", "txt", "text") if name in table.column_names), None)
    if label is not None:
        return table.rename_column(label, "label").select_columns(["image", "label"])
    if "json" in table.column_names and "label" in table.features["json"]:
        labels = [row["label"] for row in table["json"]]
    else:
        labels = [os.path.basename(os.path.dirname(key)) for key in table["__key__"]]
    return table.select_columns(["image"]).add_column("label", labels)


def _table(
    paths: list[bytes], labels: pa.Array | pa.ChunkedArray, feature: datasets.ClassLabel | None = None
) -> datasets.Dataset:
    """Paths as bytes: the library's own Image feature holds text only."""
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.binary())], names=["bytes", "path"]
    )
    table = pa.table({"image": images, "label": labels})
    features = datasets.Features.from_arrow_schema(table.schema)
    if feature is not None:
        features["label"] = feature
    return datasets.Dataset(InMemoryTable(table.cast(features.arrow_schema)))


def _image_paths(folder: Path, classes: list[str]) -> list[list[bytes]]:
    """The image files of each class, sorted by path.

    What lies in a class's own folder belongs to it, whatever links of other classes lead there; then links
    add what no class holds."""
    seen = _Seen()
    for above in (folder.resolve(), *folder.resolve().parents):
        seen.new(str(above))  # a link upwards would lead to the other splits, and to everything else
    own = [[str(folder / name)] if seen.new(str(folder / name)) else [] for name in classes]
    links: list[list[str]] = [[] for _ in classes]
    found = [list(seen.walk(roots, aside)) for roots, aside in zip(own, links, strict=True)]
    for paths, aside in zip(found, links, strict=True):
        while aside:
            new = [path for path in sorted(aside) if seen.new(path)]
            aside.clear()
            paths += [path for path in new if not os.path.isdir(path)]
            paths += seen.walk([path for path in new if os.path.isdir(path)], aside)
    if seen.again:
        logger.warning("%s: %d links lead to files or folders that are read already", folder, seen.again)
    return [[os.fsencode(path) for path in sorted(paths)] for paths in found]


class _Seen:
    """Which real files and folders were met, and how many of them again."""

    def __init__(self) -> None:
        self.again = 0
        self._met: set[tuple[int, int]] = set()

    def new(self, path: str) -> bool:
        """Whether a file or folder is met for the first time; a link to nothing is, too."""
        try:
            status = os.stat(path)
        except OSError:
            return True  # which cannot be decoded, and is said by name then
        return self._new(status.st_dev, status.st_ino)

    def walk(self, folders: list[str], links: list[str]) -> Iterator[str]:
        """The image files in ``folders``, which have been met, and below; links are added to ``links``."""
        for folder in folders:
            device, below = os.stat(folder).st_dev, []
            for entry in os.scandir(folder):
                is_image = entry.name.lower().endswith(_ENDINGS)
                if entry.name[0] == ".":
                    continue
                if entry.is_symlink():
                    links += [entry.path] if is_image or entry.is_dir() else []
                elif entry.is_dir():
                    below.append(entry.path)
                elif is_image and entry.is_file() and self._new(device, entry.inode()):
                    yield entry.path
            yield from self.walk([path for path in below if self.new(path)], links)

    def _new(self, device: int, number: int) -> bool:
        new = (device, number) not in self._met
        self._met.add((device, number))
        self.again += not new
        return new


def read_listing(files: Sequence[Path], columns: Sequence[str]) -> datasets.Dataset:
    """Tables whose rows name an image file and its class, one after the other: CSV, TSV, or a JSON object per
    line.

    The column of paths, relative to the listing's folder, is ``image``, ``path``, ``file_name`` …; that of
    classes ``label``, ``class`` …; ``columns`` names the two if they are called otherwise. A column ``split``
    may say what each row is for. Raises ValueError: it cannot be read, one of the columns is missing, or that
    of paths holds something else."""
    usual = (_PATH_COLUMNS, _LABEL_COLUMNS)
    paths, labels = (tuple(dict.fromkeys((own, *names))) for own, names in zip(columns, usual, strict=True))
    images: list[bytes] = []
    classes: list[pa.Array] = []
    splits: list[str | None] = []
    for file in files:
        with Explained(f"{file} cannot be read as a listing (", "); correct data.name"):
            table = _parsed(file, paths, labels)
        path, label = (_first(file, table.column_names, names) for names in (paths, labels))
        folder, kind = os.fsencode(file.parent), table.schema.field(path).type
        if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_binary, pa.types.is_null)):
            raise ValueError(f"{file} holds {kind} in column {path}, not paths; set data.columns")
        names = (os.fsencode(name or "") for name in table.column(path).to_pylist())  # null is no image
        images += [os.path.join(folder, name) for name in names]
        classes.append(table.column(label).combine_chunks())
        splits += table.column("split").to_pylist() if "split" in table.column_names else [None] * len(table)
    read = _table(images, _numbers(pa.chunked_array(classes)))
    return read.add_column("split", splits) if any(splits) else read


def _parsed(file: Path, paths: Sequence[str], labels: Sequence[str]) -> pa.Table:
    if file.suffix.startswith(".json"):
        return pyarrow.json.read_json(file)
    # Paths need not be UTF-8, and labels such as 007 keep their zeros.
    types = dict.fromkeys(paths, pa.binary()) | dict.fromkeys((*labels, "split"), pa.string())
    options = pyarrow.csv.ConvertOptions(column_types=types)
    tabs = pyarrow.csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",")
    return pyarrow.csv.read_csv(file, parse_options=tabs, convert_options=options)


def _first(file: Path, present: list[str], wanted: Sequence[str]) -> str:
    found = next((name for name in wanted if name in present), None)
    if found is None:
        raise ValueError(f"{file} has no column {' or '.join(wanted)}, only {', '.join(present)}; rename one")
    return found


def _numbers(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text that is nothing but plain integers as integers, so that 10 follows 9."""
    try:
        numbers = labels.cast(pa.int64())
    except pa.ArrowInvalid:
        return labels
    return numbers if numbers.cast(pa.string()).equals(labels.cast(pa.string())) else labels


def halves(table: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """``train`` and ``test`` of images that nobody has split: of each class one in five, at least one of
    several, is for testing. Which ones depends on the number of images and on nothing else."""
    labels = np.unique(np.asarray([str(label) for label in table["label"]]), return_inverse=True)[1]
    order = np.lexsort((mix(np.arange(len(labels), dtype=np.uint64)), labels))
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    held = np.zeros(len(labels), dtype=bool)
    held[order] = (place % _HELD_OUT == 0) & (np.repeat(counts, counts) > 1)
    return {"train": table.select(np.flatnonzero(~held)), "test": table.select(np.flatnonzero(held))}
