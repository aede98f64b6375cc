"""What stands beside the tensors of a network: how its images are prepared, and ``network.json``, which a
program or an ONNX file needs to be fed and checked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from offload_sparse.export import json_values
from offload_sparse.export.json_values import Count
from offload_sparse.store.files import write_file

Kind = Literal["torch_export", "onnx"]

DESCRIPTION_FILE = "network.json"
FILES: dict[Kind, tuple[str, ...]] = {
    "torch_export": ("model.pt2",),
    "onnx": ("model.onnx", "model.onnx.data"),
}
"""The names that the files of a network may have; the first is the network, further ones hold its weights."""

_FORMAT = 1
_MAX_PIXELS = 1 << 24


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through before the network sees it; what is not known is empty. ``mean`` and ``std``
    are per channel, of pixels scaled to [0, 1]; ``shape`` is channels, height and width."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shape: tuple[Count, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError("mean and std are not one value per channel, with std above 0")
        if self.shape and (len(self.shape) != 3 or not 0 < prod(self.shape) <= _MAX_PIXELS):
            raise ValueError("shape is not channels, height and width of an image")
        if self.mean and self.shape and len(self.mean) != self.shape[0]:
            raise ValueError("mean and shape have different numbers of channels")


@dataclass(frozen=True)
class Description:
    """The contents of ``network.json``: ``files`` has the digest of each file of the network by name,
    ``model`` is that of the full network that it was pruned from, ``dtype`` that of images and logits."""

    format: Count
    kind: Kind
    files: dict[str, str]
    model: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise ValueError(f"it is of format {self.format}, this version reads {_FORMAT}")
        if not {FILES[self.kind][0]} <= self.files.keys() <= set(FILES[self.kind]):
            raise ValueError(f"its files are not those of {self.kind}")


def describe(
    folder: Path, kind: Kind, model: dict[str, Any], preprocessing: Preprocessing, dtype: Any
) -> None:
    """Write ``network.json`` for the files of ``kind`` that ``folder`` holds."""
    files = {name: file_digest(folder / name) for name in FILES[kind] if (folder / name).is_file()}
    description = Description(Count(_FORMAT), kind, files, model, preprocessing, dtype)
    write_file(folder / DESCRIPTION_FILE, json.dumps(asdict(description), indent=1) + "\n")


def read_description(folder: Path) -> Description:
    """The checked contents of ``network.json``; the files that it names are there and whole. Raises
    FileNotFoundError: there is no ``network.json``; ValueError: it is damaged, or a file is missing or
    damaged."""
    description = json_values.read(folder / DESCRIPTION_FILE, Description)
    for name in FILES[description.kind]:  # which cannot leave the folder
        if name not in description.files and (folder / name).exists():
            raise ValueError(f"{folder / name} is of another export; remove it")
    for name, digest in description.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file() or digest != file_digest(file):
            raise ValueError(f"{file} is missing, damaged, or of another export; export the network again")
    return description


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
