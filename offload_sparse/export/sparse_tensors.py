"""Tensors with many zeros, as plain tensors that a safetensors file can hold.

A tensor [rows, ...] counts as a matrix of its rows. What is stored of ``w`` is

    coo   w.values [n]   w.index [n], position in the flat tensor
    csr   w.values [n]   w.columns [n]   w.pointers [rows + 1], the entries of row r are pointers[r] … [r + 1]

Indices take 2 bytes where they fit, else 4 or 8. Minus zero is written as zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from offload_sparse.export.description import ExportLayout

_PARTS = {"coo": ("values", "index"), "csr": ("values", "columns", "pointers")}


def encode(tensors: Mapping[str, Tensor], layout: ExportLayout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store of ``tensors``, and the layout of each that is not stored as it is.

    Only floating-point tensors of at least two dimensions are encoded, others stay as they are.

    Args:
        tensors: by name, contiguous.
        layout: ``dense``, ``coo``, ``csr``, or ``auto``: the smallest of them for each tensor.
    """
    stored: dict[str, Tensor] = {}
    layouts: dict[str, str] = {}
    for name, tensor in tensors.items():
        matrix = tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel() > 0
        chosen = _encode(tensor, layout) if matrix else ("dense", {"": tensor})
        if chosen[0] == "dense":
            stored[name] = tensor
            continue
        layouts[name] = chosen[0]
        stored |= {f"{name}.{part}": value for part, value in chosen[1].items()}
    return stored, layouts


def decode(
    stored: Mapping[str, Tensor], layouts: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The inverse of ``encode``.

    Args:
        stored: what was read.
        layouts: layouts by name, as ``encode`` gave them; not trusted.
        shapes: shape of every tensor by name.

    Raises:
        ValueError: parts are missing or do not describe a tensor of that shape.
    """
    tensors = dict(stored)
    if not isinstance(layouts, Mapping):
        raise ValueError("'layouts' is no mapping")
    for name, layout in layouts.items():
        if layout not in _PARTS or name not in shapes:
            raise ValueError(f"the layout {layout!r} of {name!r} is unknown")
        parts = {}
        for part in _PARTS[layout]:
            if f"{name}.{part}" not in tensors:
                raise ValueError(f"{name}.{part} is missing")
            parts[part] = tensors.pop(f"{name}.{part}")
        tensors[name] = _decode(name, layout, parts, tuple(int(n) for n in shapes[name]))
    return tensors


def _encode(tensor: Tensor, layout: ExportLayout) -> tuple[str, dict[str, Tensor]]:
    if layout == "coo":
        return layout, _coo(tensor)
    if layout == "csr":
        return layout, _csr(tensor)
    if layout == "dense":
        return layout, {}
    choices = {"dense": {"": tensor}, "csr": _csr(tensor), "coo": _coo(tensor)}
    sizes = {name: sum(t.nbytes for t in parts.values()) for name, parts in choices.items()}
    best = min(sizes, key=lambda name: sizes[name])
    return best, choices[best]


def _coo(tensor: Tensor) -> dict[str, Tensor]:
    flat = tensor.flatten()
    index = flat.nonzero().flatten()
    return {"values": flat[index], "index": _compact(index, flat.numel())}


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


def _decode(name: str, layout: str, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    values = parts["values"]
    if not shape or min(shape) < 0 or not values.is_floating_point():
        raise ValueError(f"{name!r} cannot be stored as {layout}")
    size, rows = prod(shape), shape[0]
    indices = {part: index.to(torch.int64) for part, index in parts.items() if part != "values"}
    if (
        any(parts[part].is_floating_point() or parts[part].dim() != 1 for part in indices)
        or values.dim() != 1
    ):
        raise ValueError(f"the parts of {name!r} are no vectors of indices and values")
    if layout == "coo":
        index = indices["index"]
    else:
        columns, pointers = indices["columns"], indices["pointers"]
        ordered = len(pointers) == rows + 1 and int(pointers[0]) == 0 and bool((pointers.diff() >= 0).all())
        width = size // max(1, rows)
        if not ordered or int(pointers[-1]) != len(columns) or not _within(columns, width):
            raise ValueError(f"the rows of {name!r} do not add up")
        index = torch.repeat_interleave(torch.arange(rows), pointers.diff()) * width + columns
    if len(index) != len(values) or not _within(index, size):
        raise ValueError(f"the positions of {name!r} lie outside its shape")
    tensor = torch.zeros(size, dtype=values.dtype)
    tensor[index] = values
    return tensor.view(shape)


def _within(index: Tensor, bound: int) -> bool:
    return not index.numel() or (int(index.min()) >= 0 and int(index.max()) < bound)
