"""Labels of the elements of a tensor: int64 of its shape, -1 for none; repeated entries have stride 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def dimensions(x: Tensor, dims: Any = None) -> set[int]:
    """The dimensions that an operation on ``x`` is given; all if it is given none."""
    if not isinstance(dims, (int, list, tuple)) or dims == []:
        return set(range(x.dim()))
    return {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}


def compact(labels: Tensor) -> Tensor:
    """The same labels with size 1 in every dimension along which they are one repeated entry."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def varying(labels: Tensor) -> frozenset[int]:
    """The dimensions along which labels differ."""
    small = compact(labels)
    return frozenset(
        dim
        for dim in range(small.dim())
        if small.shape[dim] > 1 and bool((small != small.narrow(dim, 0, 1)).any())
    )


def lowest(labels: Tensor, dims: Iterable[int]) -> Tensor:
    """The smallest label along ``dims``, with the shape of ``labels``."""
    dims = sorted(dims)
    return compact(labels).amin(dims, keepdim=True).expand(labels.shape) if dims else labels


def spread(vector: Tensor, dim: int, shape: Iterable[int]) -> Tensor:
    """Labels of a tensor of ``shape`` that are those of a vector along one of its dimensions."""
    shape = tuple(shape)
    return vector.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def first(labels: Tensor, dim: int) -> Tensor:
    """The labels along ``dim`` at position 0 of all others."""
    return labels[tuple(slice(None) if d == dim else 0 for d in range(labels.dim()))]


def viewed(labels: Tensor, shape: torch.Size) -> Tensor:
    """Labels as a tensor of ``shape`` that holds the same elements in the same order."""
    lead = 0
    while (
        lead < min(labels.dim(), len(shape))
        and labels.shape[lead] == shape[lead]
        and labels.stride(lead) == 0
    ):
        lead += 1
    inner = labels[(0,) * lead] if lead else labels
    return inner.reshape(shape[lead:]).expand(shape)


def beside(comps: Iterable[Sequence[Tensor]], tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The labels of several tensors, as many of each: -1 where one has fewer."""
    given = list(comps)
    width = max(map(len, given))
    none = [torch.full((1,) * x.dim(), -1, device="cpu").expand(x.shape) for x in tensors]
    return list(zip(*([*c, *([n] * width)][:width] for c, n in zip(given, none, strict=True)), strict=True))


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Labels of tensors that lie one behind another along ``dim``."""
    dim %= parts[0].dim()
    once = [d != dim and all(part.stride(d) == 0 for part in parts) for d in range(parts[0].dim())]
    small = [part[tuple(slice(1 if repeated else None) for repeated in once)] for part in parts]
    return torch.cat(small, dim).expand([-1 if d == dim else n for d, n in enumerate(parts[0].shape)])


def padded(labels: Tensor, pad: list[int], shape: torch.Size) -> Tensor:
    """Labels of a tensor of ``shape`` with positions before and behind those that are labelled: two numbers
    per dimension, from the last on. Where labels differ the others have none."""
    along = varying(labels)
    one = labels[tuple(slice(None if d in along else 1) for d in range(labels.dim()))]
    within = [n if labels.dim() - 1 - i // 2 in along else 0 for i, n in enumerate(pad)]
    return torch.constant_pad_nd(one, within, -1).expand(shape)


def connected_components(size: int, u: Tensor, v: Tensor) -> Tensor:
    """Union-find over all edges (u[i], v[i]) at once: int64[size], the smallest member of each component."""
    root = torch.arange(size)
    while True:
        ru, rv = root[u], root[v]
        open_edges = ru != rv
        if not bool(open_edges.any()):
            return root
        low, high = torch.minimum(ru, rv)[open_edges], torch.maximum(ru, rv)[open_edges]
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
