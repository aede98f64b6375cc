"""Tensors with many zeros, as plain tensors that a safetensors file can hold.

A tensor [rows, ...] counts as a matrix of its rows (CSR). What is stored of ``w`` is

    w.values [n]   w.columns [n]   w.pointers [rows + 1], the entries of row r are pointers[r] … [r + 1]

Indices take 2 bytes where they fit, else 4 or 8. Minus zero is written as zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

_PARTS = ("values", "columns", "pointers")
_EXPANSION, _ALWAYS = 2000, 256 << 20


def encode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What to store of (contiguous) tensors, and the names of those that are stored without their zeros: the
    floating-point tensors of at least two dimensions that become smaller so."""
    stored: dict[str, Tensor] = {}
    sparse: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel():
            parts = _csr(tensor)
            if sum(part.nbytes for part in parts.values()) < tensor.nbytes:
                stored |= {f"{name}.{part}": value for part, value in parts.items()}
                sparse.append(name)
                continue
        stored[name] = tensor
    if sum(tensors[name].nbytes for name in sparse) > _limit(stored):
        return dict(tensors), []
    return stored, sparse


def decode(
    stored: Mapping[str, Tensor], sparse: Collection[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The inverse of ``encode``, which trusts neither the names of the sparse tensors nor the shapes: nothing
    is allocated before these are in proportion. Raises ValueError: parts are missing or do not describe a
    tensor of that shape, or a few bytes would become far more (2,000 times what is stored, and more than 256
    MiB)."""
    tensors = dict(stored)
    parts = {}
    for name in sparse:
        if name not in shapes or any(f"{name}.{part}" not in tensors for part in _PARTS):
            raise ValueError(f"the values, columns, pointers or shape of {name!r} are missing")
        parts[name] = {part: tensors.pop(f"{name}.{part}") for part in _PARTS}
    expanded = sum(prod(shapes[name]) * parts[name]["values"].element_size() for name in parts)
    if expanded > _limit(stored):
        raise ValueError(f"tensors without their zeros would take {expanded:,} bytes, out of all proportion")
    return tensors | {name: _decode(name, parts[name], tuple(shapes[name])) for name in parts}


def _limit(stored: Mapping[str, Tensor]) -> int:
    return max(_ALWAYS, _EXPANSION * sum(tensor.nbytes for tensor in stored.values()))


def _csr(tensor: Tensor) -> dict[str, Tensor]:
    matrix = tensor.flatten(1)
    rows, columns = matrix.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(matrix))
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return {
        "values": matrix[rows, columns],
        "columns": _compact(columns, matrix.shape[1]),
        "pointers": _compact(pointers, len(rows) + 1),
    }


def _compact(index: Tensor, bound: int) -> Tensor:
    """``index`` (below ``bound``) in the smallest signed type that holds it."""
    for dtype in (torch.int16, torch.int32):
        if bound - 1 <= torch.iinfo(dtype).max:
            return index.to(dtype)
    return index


def _decode(name: str, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    values = parts["values"]
    indices = [parts[part] for part in _PARTS[1:]]
    integers = all(index.dtype in (torch.int16, torch.int32, torch.int64) for index in indices)
    if not integers or not values.is_floating_point() or any(part.dim() != 1 for part in parts.values()):
        raise ValueError(f"the parts of {name!r} are no vectors of indices and values")
    columns, pointers = (index.to(torch.int64) for index in indices)
    size, rows = prod(shape), shape[0] if shape else -1
    if len(pointers) != rows + 1 or int(pointers[0]) != 0 or bool((pointers.diff() < 0).any()):
        raise ValueError(f"the rows of {name!r} do not add up")
    width = size // max(1, rows)
    inside = not len(columns) or (int(columns.min()) >= 0 and int(columns.max()) < width)
    if not inside or not len(values) == len(columns) == int(pointers[-1]):
        raise ValueError(f"the positions of {name!r} lie outside its shape")
    tensor = torch.zeros(size, dtype=values.dtype)
    tensor[torch.repeat_interleave(torch.arange(rows), pointers.diff()) * width + columns] = values
    return tensor.view(shape)
