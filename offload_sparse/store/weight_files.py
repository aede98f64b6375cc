"""Tensors in files of weights: where each lies, and its rows, read without the rest of the file.

Safetensors files, alone or in shards with an index, and state_dicts that ``torch.save`` wrote. Nothing in a
file is run, nothing is mapped into memory, and what is read goes straight to where it belongs.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_sparse.channels.require import Explained, in_one_line
from offload_sparse.store.partition import row_shape
from offload_sparse.store.tensor_file import TYPES

_BLOCK = 8 << 20
_LARGEST_INDEX = 64 << 20
_INDEX = "*.index.json"
_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_SINGLE = ("*.safetensors", "*.pt", "*.pth", "*.bin")
_USUAL = ("model", "pytorch_model")
"""Names of files of weights that have those of optimizers and schedulers beside them."""

_HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which training programs keep a state_dict."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path, offset: the file, and the byte at which the first entry lies.
        shape, stride: in entries.
        dtype: of the entries."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def tensors_in(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, or of the files in a folder or behind an index, by name. Reads no values.
    Raises ValueError: there is nothing to read, or it is damaged, or holds more than tensors; one line."""
    if path.is_dir():
        return _in_folder(path)
    return _of_shards(path) if path.is_file() and path.match(_INDEX) else _in_file(path)


def _in_file(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; give a file or folder of weights")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[:4] == b"PK\x03\x04":
            return _of_torch(path)
        if start[:1] == b"\x80" and start[8:] != b"{":  # a length may begin like a pickle
            raise ValueError(
                f"{path} was saved by a version of torch before 1.6, or is a pickle; save it once more with "
                "torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
        if path.suffix != ".safetensors" and start[8:] != b"{":
            raise ValueError(f"{path} is no file of weights: neither safetensors nor of torch.save")
        return _of_safetensors(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def check_whole(paths: Iterable[Path]) -> None:
    """Compare every part of archives of ``torch.save`` with its checksum, which reads all of them;
    safetensors files have none. Raises ValueError: one differs."""
    for path in filter(zipfile.is_zipfile, paths):
        try:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            part = in_one_line(error)
        if part is not None:
            raise ValueError(f"{path} is damaged ({part}); get it once more, or write it with torch.save")


def read_rows(stored: Stored, low: int, high: int, out: Tensor) -> int:
    """Read the rows (entries of the first dimension) from ``low`` to ``high`` into ``out``, in its type:
    contiguous, on the CPU, with as many entries. Returns bytes read. Raises ValueError: the file ends before.
    """
    _, length = row_shape(stored.shape)
    flat, size = out.detach().view(-1), stored.dtype.itemsize
    assert flat.numel() == (high - low) * length, "another number of entries"
    if not flat.numel():
        return 0
    with stored.path.open("rb", buffering=0) as file:
        contiguous = stored.stride == _strides(stored.shape) or prod(stored.shape) == 1
        if not contiguous:  # of one tensor only, and only in files of torch
            span = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
            whole = torch.empty(span, dtype=stored.dtype)
            _read(file.fileno(), whole, stored, 0)
            rows = whole.as_strided(stored.shape, stored.stride)[low:high]
            flat.copy_(rows.reshape(-1))
            return span * size
        done = 0
        for part in flat.split(_BLOCK // size):
            raw = part if part.dtype == stored.dtype else torch.empty(len(part), dtype=stored.dtype)
            _read(file.fileno(), raw, stored, low * length + done)
            if raw is not part:
                part.copy_(raw)
            done += len(part)
    return done * size


def read_whole(stored: Stored) -> Tensor:
    """All of a tensor. Raises ValueError: the file ends before."""
    value = torch.empty(stored.shape, dtype=stored.dtype)
    read_rows(stored, 0, row_shape(stored.shape)[0], value)
    return value


def _read(descriptor: int, into: Tensor, stored: Stored, first: int) -> None:
    view = memoryview(into.view(torch.uint8).numpy().data)
    position = stored.offset + first * stored.dtype.itemsize
    while view:
        count = os.preadv(descriptor, [view], position)
        if not count:
            raise ValueError(f"{stored.path} ends within its tensors; it is truncated")
        view, position = view[count:], position + count


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _in_folder(folder: Path) -> dict[str, Stored]:
    found = [sorted(folder.glob(pattern)) for pattern in _SINGLE]
    if usual := [file for files in found for file in files if file.stem in _USUAL]:
        return tensors_in(usual[0])  # an index beside it may be of files that have not been fetched
    for pattern in _INDICES:
        if indices := sorted(folder.glob(pattern)):
            return _of_shards(indices[0])
    for files in found:
        if len(files) > 1:
            raise ValueError(f"{folder} holds {len(files)} files of weights and no index; give one of them")
        if files:
            return tensors_in(files[0])
    raise ValueError(f"{folder} holds no weights; give a file or folder of safetensors, or a state_dict")


def _of_shards(index: Path) -> dict[str, Stored]:
    """The tensors that an index names, each in its file of the same folder."""
    kinds = (OSError, ValueError, KeyError, TypeError, RecursionError)
    with Explained(f"{index} is no index of shards: ", kinds=kinds):
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large")
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("weight_map does not map names to files")
    if odd := next((file for file in where.values() if Path(file).name != file), None):
        raise ValueError(f"{index} names {odd!r}, which is not a file of its own folder")
    files = {file: _in_file(index.with_name(file)) for file in sorted(set(where.values()))}
    if lost := next((name for name, file in where.items() if name not in files[file]), None):
        raise ValueError(f"{index.with_name(where[lost])} lacks {lost!r}, which {index.name} has in it")
    return {name: files[file][name] for name, file in where.items()}


def _of_safetensors(path: Path) -> dict[str, Stored]:
    """By the library's own checks of the header: the tensors lie one behind another, without gaps."""
    from safetensors import safe_open

    types = {name: dtype for dtype, name in TYPES.items()}
    found = {}
    with Explained(f"{path} is no whole safetensors file: "):
        with path.open("rb") as opened:
            offset = 8 + int.from_bytes(opened.read(8), "little")
        with safe_open(path, "np") as file:  # as "pt" it would claim memory for the whole file
            for name in file.offset_keys():
                part = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if kind not in types:
                    raise ValueError(f"{name!r} has entries of type {kind}, which are not read")
                found[name] = Stored(path, offset, shape, _strides(shape), types[kind])
                offset += prod(shape) * types[kind].itemsize
    if offset != path.stat().st_size:
        raise ValueError(f"{path} is no whole safetensors file: its size is not what its header says")
    return found


def _of_torch(path: Path) -> dict[str, Stored]:
    """By torch's unpickler of tensors, which runs no code, onto the meta device."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed")
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds objects that are no tensors, and reading them could run code; save its "
            "state_dict() alone"
        ) from None
    except Exception as error:  # torch raises what its C++ says about a damaged archive
        raise ValueError(f"{path} is no whole file of torch.save: {in_one_line(error)}") from None
    size, found = path.stat().st_size, {}
    for name, tensor in _state_dict(loaded, path).items():
        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        start = getattr(storage, "_checkpoint_offset", None)
        if storage is None or start is None or start + storage.nbytes() > size:
            raise ValueError(f"{path} is no whole file of torch.save: {name!r} has no place in it")
        offset = start + int(tensor.storage_offset()) * tensor.itemsize
        found[name] = Stored(path, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return found


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what was loaded: one that is kept under a usual key, which may have
    tensors beside it that are no weights, or all of it."""
    for held in (*(loaded.get(key) for key in _HOLDERS if isinstance(loaded, Mapping)), loaded):
        if isinstance(held, Mapping):
            tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
    raise ValueError(f"{path} holds no tensors by name; give a file of a network's state_dict()")
