"""What is left of a channel that is dropped: the number that its elements are, behind every operation.

    conv ─ 0 ─ sigmoid ─ 0.5 ─ conv       columns would carry it on: the channel must be kept
                 └─ 0.5 · x ─ 0 ─ conv    a gate carries nothing
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_PRODUCT = re.compile(r"(convolution|\w*mm|\w*(batch|group)_norm\w*)")
_PASSED = re.compile(r"(clone|masked_fill_?|bernoulli\w*)")
_OTHER = re.compile(r"(fill_|_\w*softmax|(ones|rand|randn|full)_like)")
_CONSTANT = 0.7
"""Stands for every element of a tensor without channels."""


class Remainders:
    """Notes it for each tensor that operations give, as long as these live.

    Args:
        has_channels: whether a tensor has any that may be dropped; those of weights are zero then."""

    def __init__(self, has_channels: Callable[[Tensor], bool]) -> None:
        self._has_channels = has_channels
        self._of: dict[int, float] = {}

    def of(self, x: Tensor) -> float:
        return self._of.get(id(x), 0.0 if self._has_channels(x) else _CONSTANT)

    def note(self, results: Iterable[Tensor], value: float) -> None:
        """``value`` is left in each of ``results``."""
        self._of |= {id(x): value for x in results}

    def behind(self, func: Any, args: Any, kwargs: Any) -> float:
        """What is left behind an operation; of a sum of some, one of them."""
        name = func.overloadpacket.__name__
        if "zero" in name:
            return 0.0
        if _OTHER.fullmatch(name):
            return _CONSTANT
        if name == "constant_pad_nd" and args[2:] not in ((), (-torch.inf,)):  # which a maximum passes over
            return float(args[2])
        if torch.Tag.pointwise in func.tags and not _PASSED.fullmatch(name):
            scalars = pytree.tree_map_only(Tensor, self._scalar, (args, kwargs))
            return float(pytree.tree_leaves(func(*scalars[0], **scalars[1]))[0].real)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        left = [self.of(x) for x in given if self._has_channels(x)]
        return (min if _PRODUCT.fullmatch(name) else max)(left, key=abs, default=0.0)

    def _scalar(self, x: Tensor) -> Tensor:
        left = torch.tensor(self.of(x), device="cpu")
        return left.to(x.dtype) if x.is_floating_point() or x.is_complex() else left.ceil().to(x.dtype)
