"""``manifest.json``: what a checkpoint holds, where, and how each file must look.

    {"digest": BLAKE2b of the body,
     "body": {"format", "step", "world_size", "config", "run", "method",
              "files":   {file: {size, crc32}},
              "tensors": {name: {dtype, shape, chunks: [{first_row, rows, file}]}}}}

It takes the place of torch.distributed.checkpoint's own metadata file, which is a pickle: reading a
checkpoint parses JSON and safetensors and runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from offload_sparse.run.rows_file import FILE_NAME, FileRecord

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}


@dataclass(frozen=True)
class Chunk:
    """Rows of a tensor, and the file that holds them."""

    first_row: int
    rows: int
    file: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint; a scalar (shape []) is stored as one row."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape or (1,)


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: optimizer steps of the run that are done.
        world_size: ranks that wrote it.
        config: configuration of the run, by dotted name.
        run: what the loop around the method remembers.
        method: ``MethodState.meta``.
    """

    step: int
    world_size: int
    config: dict[str, Any]
    run: dict[str, Any]
    method: dict[str, Any]
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def metadata(self) -> Metadata:
        """The tensors as torch.distributed.checkpoint plans with them."""
        return Metadata({name: _metadata_of(tensor) for name, tensor in self.tensors.items()})


def dump(manifest: Manifest) -> str:
    """The manifest as text; ``load`` is its inverse."""
    tensors = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "chunks": [asdict(chunk) for chunk in tensor.chunks],
        }
        for name, tensor in manifest.tensors.items()
    }
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "config": manifest.config,
        "run": manifest.run,
        "method": manifest.method,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "tensors": tensors,
    }
    return json.dumps({"digest": _digest(body), "body": body}, allow_nan=False) + "\n"


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged, of another format, or points out of its folder.
    """
    path = folder / MANIFEST_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        body = document["body"]
        if document["digest"] != _digest(body):
            raise ValueError("its digest does not fit")
        if body["format"] != FORMAT:
            raise ValueError(f"it is of format {body['format']}, this version reads {FORMAT}")
        return _parse(body)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {MANIFEST_FILE}; it is no complete checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {reason}") from None


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parse(body: Mapping[str, Any]) -> Manifest:
    files = {
        name: FileRecord(_count(entry["size"]), _count(entry["crc32"]))
        for name, entry in body["files"].items()
    }
    for name in files:
        if not re.fullmatch(FILE_NAME, name):
            raise ValueError(f"the file name {name!r} is not one that a checkpoint has")
    tensors = {name: _parse_tensor(name, entry, files) for name, entry in body["tensors"].items()}
    _check_sizes(files, tensors)
    config, run, method = body["config"], body["run"], body["method"]
    if not all(isinstance(part, dict) for part in (config, run, method)):
        raise ValueError("config, run and method must be mappings")
    return Manifest(_count(body["step"]), _count(body["world_size"]), config, run, method, files, tensors)


def _parse_tensor(name: str, entry: Mapping[str, Any], files: Mapping[str, FileRecord]) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the unknown type {entry['dtype']!r}")
    chunks = tuple(
        Chunk(_count(c["first_row"]), _count(c["rows"]), c["file"])
        for c in sorted(entry["chunks"], key=lambda c: c["first_row"])
    )
    tensor = StoredTensor(_DTYPES[entry["dtype"]], tuple(_count(n) for n in entry["shape"]), chunks)
    expected = 0
    for chunk in chunks:
        if chunk.file not in files or chunk.first_row != expected:
            raise ValueError(f"the rows of {name} do not follow each other in the files of the checkpoint")
        expected += chunk.rows
    if expected != tensor.stored_shape[0] and 0 not in tensor.stored_shape:
        raise ValueError(f"{name} has {expected} of its {tensor.stored_shape[0]} rows")
    return tensor


def _check_sizes(files: Mapping[str, FileRecord], tensors: Mapping[str, StoredTensor]) -> None:
    """No file can hold more than it has, so that nobody allocates what was never written."""
    taken = dict.fromkeys(files, 0)
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            taken[chunk.file] += chunk.rows * prod(tensor.stored_shape[1:]) * tensor.dtype.itemsize
    for name, size in taken.items():
        if size > files[name].size:
            raise ValueError(f"{name} cannot hold the tensors that are said to be in it")


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _metadata_of(tensor: StoredTensor) -> TensorStorageMetadata:
    shape = tensor.stored_shape
    rest = shape[1:]
    chunks = [
        ChunkStorageMetadata(torch.Size([c.first_row, *[0] * len(rest)]), torch.Size([c.rows, *rest]))
        for c in tensor.chunks
    ]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), chunks)
