"""A folder of images as a table of their paths: nothing is opened, copied or cached."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from PIL import Image


def read_image_folder(folder: Path) -> datasets.Dataset:
    """Columns ``image`` and ``label`` of the images below ``folder/<class>/``, sorted by class and path.

    Files whose names do not end as those of images do are passed over.

    Raises:
        ValueError: there are no sub-folders, or no images in them.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise ValueError(f"{folder} has no sub-folders; put its images into one sub-folder per class")
    per_class = [_image_paths(folder / name) for name in classes]
    classes = [name for name, paths in zip(classes, per_class, strict=True) if paths]
    per_class = [paths for paths in per_class if paths]
    if not classes:
        raise ValueError(f"{folder} holds no images in one sub-folder per class; correct data.name")
    paths = pa.array([path for paths in per_class for path in paths], type=pa.string())
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in per_class])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    no_bytes = pa.nulls(len(paths), pa.binary())
    images = pa.StructArray.from_arrays([no_bytes, paths], names=["bytes", "path"])
    return datasets.Dataset(
        InMemoryTable(pa.table({"image": images, "label": labels}, schema=features.arrow_schema))
    )


def _image_paths(folder: Path) -> list[str]:
    endings = tuple(Image.registered_extensions())
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(endings) and name[0] != "."
    )
