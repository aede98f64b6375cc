"""``network.json``: what stands beside a program or an ONNX file, so that it can be fed and checked.

kind            torch_export or onnx
files           name of each file of the network, with its digest
model           name and arguments of the full network that it was pruned from
preprocessing   mean, std, shape and class names of its images
dtype           type of images and logits
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ExportLayout = Literal["auto", "dense", "coo", "csr"]
Kind = Literal["torch_export", "onnx"]

DESCRIPTION_FILE = "network.json"
FILES: dict[Kind, tuple[str, ...]] = {
    "torch_export": ("model.pt2",),
    "onnx": ("model.onnx", "model.onnx.data"),
}
"""The names that the files of a network may have; the first is the network, further ones hold its weights."""

_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """The contents of ``network.json``; see above."""

    kind: Kind
    files: dict[str, str]
    model: dict[str, Any]
    preprocessing: dict[str, Any]
    dtype: str


def describe(
    folder: Path, kind: Kind, model: dict[str, Any], preprocessing: dict[str, Any], dtype: str
) -> Description:
    """Write ``network.json`` for the files of ``kind`` that ``folder`` holds."""
    files = {name: file_digest(folder / name) for name in FILES[kind] if (folder / name).is_file()}
    description = Description(kind, files, model, preprocessing, dtype)
    text = json.dumps({"format": _FORMAT} | asdict(description), indent=1)
    (folder / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
    return description


def read_description(folder: Path) -> Description:
    """The checked contents of ``network.json``; the files that it names are there and whole.

    Raises:
        ValueError: it is missing or damaged, or a file is.
    """
    path = folder / DESCRIPTION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of UTF-8 and JSON, too
        raise ValueError(f"{path} cannot be read: {error}; export the network again") from None
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is no description of format {_FORMAT}; export the network again")
    kind, files = content.get("kind"), content.get("files")
    if kind not in FILES or not isinstance(files, dict) or not files.keys() <= set(FILES[kind]):
        raise ValueError(f"{path} names no kind of network, or files that are none; export the network again")
    expected = {"model": dict, "preprocessing": dict, "dtype": str}
    for key, kind_of_value in expected.items():
        if not isinstance(content.get(key), kind_of_value):
            raise ValueError(f"{path} lacks {key!r}; export the network again")
    for name in (FILES[kind][0], *files):
        file = folder / name  # names come from the table above and cannot leave the folder
        if not file.is_file() or files.get(name) != file_digest(file):
            raise ValueError(f"{file} is missing, damaged, or of another export; export the network again")
    return Description(kind, files, content["model"], content["preprocessing"], content["dtype"])


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
