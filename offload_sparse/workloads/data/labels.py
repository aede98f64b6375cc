"""From the label column of a table to class numbers: the labels that occur are numbered, in sorted order, and
their values kept as the names of the classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.require import Explained

_MOST_BYTES = 64 << 20


class Labels(NamedTuple):
    """The labels of a split as they are stored: the position of each row's label in ``values`` (int64[N],
    negative for none), and the different labels as text: all names of a ``ClassLabel`` column, else those
    that occur."""

    codes: NDArray[np.int64]
    values: tuple[str, ...]


def read_labels(column: pa.ChunkedArray, feature: object, split: str, name: str) -> Labels:
    """The labels in a column of integers, truth values or text, by the type that the library knows; ``split``
    and ``name`` are for messages. Raises ValueError: a row has no label, or an empty one, or the column holds
    something else."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text:
        column = pc.utf8_trim_whitespace(column)  # such as the end of a line
    missing = column.null_count + (pc.sum(pc.equal(column, "")).as_py() or 0 if is_text else 0)
    if missing:
        raise ValueError(f"column {name!r} has {missing} rows without a label; remove them")
    if isinstance(feature, datasets.ClassLabel):
        return Labels(column.to_numpy().astype(np.int64), tuple(feature.names))
    if not (is_text or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(
            f"column {name!r} of split {split!r} holds {column.type}, not class labels; set "
            "data.columns to a column of integers or names"
        )
    values = sorted(column.unique().to_pylist())
    codes = pc.index_in(column, value_set=pa.array(values, type=column.type))
    return Labels(codes.to_numpy().astype(np.int64), tuple(map(str, values)))


def class_names(train: Labels, class_map: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes by number, from the training split. ``class_map`` has the name of the class of
    each label, which may be shared; in its order, those that occur are numbered. It is empty where labels are
    names."""
    if not class_map:
        return train.values
    occurring = {class_map.get(train.values[code]) for code in np.unique(train.codes) if code >= 0}
    return tuple(name for name in dict.fromkeys(class_map.values()) if name in occurring)


def class_numbers(
    labels: Labels,
    split: str,
    names: Sequence[str],
    class_map: Mapping[str, str],
    whose: str,
) -> Tensor:
    """int64[N]: the number of each row's class. Raises ValueError: a label belongs to no class of those that
    are numbered, which are ``whose``."""
    number = {name: i for i, name in enumerate(names)}
    wanted = [number.get(class_map.get(value, "") if class_map else value, -1) for value in labels.values]
    known = (labels.codes >= 0) & (labels.codes < len(wanted))
    found = np.where(known, np.array([*wanted, -1])[np.where(known, labels.codes, 0)], -1)
    if (found < 0).any():
        code = int(labels.codes[found < 0][0])
        value = labels.values[code] if 0 <= code < len(wanted) else str(code)
        where = "data.class_map" if class_map and value not in class_map else whose
        raise ValueError(
            f"split {split!r} has labels outside the {len(names)} classes of {where}, such as {value!r}; "
            "choose another split or data.columns, or name the class of each label in data.class_map"
        )
    return torch.from_numpy(found)


def read_class_map(path: str) -> dict[str, str]:
    """Names of classes by label: a JSON object, or lines of a label, white space and a name. Raises
    ValueError: the file is missing, too large, or something else."""
    file = Path(path).expanduser()
    advice = "); give a JSON object {label: name}, or lines of a label and a name"
    with Explained(f"data.class_map {path} cannot be read (", advice):
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"no regular file of at most {_MOST_BYTES >> 20} MiB")
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        if text.lstrip().startswith("{"):
            return {str(label): str(name) for label, name in json.loads(text).items()}
        pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
        return {label: name.strip() for label, name in pairs}
