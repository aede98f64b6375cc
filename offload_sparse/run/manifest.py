"""``manifest.json``: what a checkpoint holds, where, and how each file must look.

    {"digest": BLAKE2b of the body,
     "body": {"format", "step", "world_size", "config", "run", "method",
              "files":   {file: {size, crc32}},
              "tensors": {name: {dtype, shape, chunks: [{first_row, rows, file}]}}}}

``tensors`` are those whose rows are spread over the files. Reading a checkpoint parses JSON and safetensors
and runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload_sparse.run.rows_file import FileRecord, file_name

MANIFEST_FILE = "manifest.json"
FORMAT = 2
_LARGEST = 256 << 20  # bytes of a manifest


@dataclass(frozen=True)
class Chunk:
    """Rows of a tensor, and the file that holds them."""

    first_row: int
    rows: int
    file: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint; a scalar (shape []) is stored as one row."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: optimizer steps of the run that are done.
        world_size: ranks that wrote it.
        config: configuration of the run, by dotted name.
        run: what the loop around the method remembers.
        method: ``MethodState.meta``.
        files: how each file must look.
        tensors: where the rows of each tensor are.
    """

    step: int
    world_size: int
    config: dict[str, Any]
    run: dict[str, Any]
    method: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, StoredTensor]


def dump(manifest: Manifest) -> str:
    """The manifest as text; ``load`` is its inverse."""
    body = {"format": FORMAT} | asdict(manifest)
    return json.dumps({"digest": digest(body), "body": body}, allow_nan=False) + "\n"


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged, of another format, or points out of its folder.
    """
    path = folder / MANIFEST_FILE
    try:
        if not path.is_file():
            raise ValueError(f"{folder} holds no {MANIFEST_FILE}; it is no complete checkpoint")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} is damaged: it has more than {_LARGEST} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    try:
        document = json.loads(text)
        body = document["body"]
        if document["digest"] != digest(body):
            raise ValueError("its digest does not fit")
        if body["format"] != FORMAT:
            raise ValueError(f"it is of format {body['format']!r:.20}, this version reads {FORMAT}")
        return _parse(body)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {reason:.200}") from None


def digest(body: Mapping[str, Any]) -> str:
    """Of the values, whatever the spaces and the order of the keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parse(body: Mapping[str, Any]) -> Manifest:
    step, world_size = _count(body["step"]), _count(body["world_size"])
    files = {name: FileRecord(_count(f["size"]), _count(f["crc32"])) for name, f in body["files"].items()}
    if set(files) != {file_name(rank) for rank in range(min(world_size, len(files) + 1))}:
        raise ValueError(f"its files are not those of {world_size} ranks")
    tensors = {name: _parse_tensor(name, entry, files) for name, entry in body["tensors"].items()}
    config, run, method = body["config"], body["run"], body["method"]
    if not all(isinstance(part, dict) for part in (config, run, method)):
        raise ValueError("config, run and method must be mappings")
    return Manifest(step, world_size, config, run, method, files, tensors)


def _parse_tensor(name: str, entry: Mapping[str, Any], files: Mapping[str, FileRecord]) -> StoredTensor:
    chunks = tuple(Chunk(_count(c["first_row"]), _count(c["rows"]), str(c["file"])) for c in entry["chunks"])
    shape, expected = tuple(_count(n) for n in entry["shape"]), 0
    for chunk in chunks:
        if chunk.file not in files or chunk.first_row != expected:
            raise ValueError(f"the rows of {name} do not follow each other in the files of the checkpoint")
        expected += chunk.rows
    rows = (shape or (1,))[0]
    if expected != rows and 0 not in shape:
        raise ValueError(f"{name} has {expected} of its {rows} rows")
    return StoredTensor(str(entry["dtype"]), shape, chunks)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:20]!r} is no count")
    return value
