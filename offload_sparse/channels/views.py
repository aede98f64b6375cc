"""Sizes that a network's own code writes into ``view`` and ``split``, made to fit the channels that are left.

    y.view(B, T, n_head, C // n_head)      n_head is a number of the code: of 6 heads, 4 are left
    q, k, v = x.split(n_embd, dim=2)       of each third, 256 of 384 channels are left

Discovery notes such calls by number, in the order in which one ``forward`` makes them; code that follows the
shapes of its tensors (``-1``, ``x.shape``) has none. A module with noted calls runs its own ``forward`` with
their sizes replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import Signature, signature
from itertools import count, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from offload_sparse.channels.attention import drop_heads

Fit = tuple[int, int] | None
"""(size in the code, what it becomes); a size in the code of 0 stands for any; None: as it is."""

CHUNKS: set[Any] = {Tensor.chunk, torch.chunk}
SPLITS: set[Any] = {*CHUNKS, Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}
UNFLATTENS: set[Any] = {Tensor.unflatten, torch.unflatten}
NARROWS: set[Any] = {Tensor.narrow, torch.narrow}
TENSOR_SPLITS: set[Any] = {Tensor.tensor_split, torch.tensor_split}
PLACES = 16  # the place of a dimension: number of the argument · PLACES + dimension, counted from the last
EXPANDS: set[Any] = {Tensor.expand, Tensor.broadcast_to, torch.broadcast_to}
SLICES: set[Any] = {Tensor.__getitem__}
SIZED: set[Any] = {Tensor.view, Tensor.reshape, torch.reshape} | SPLITS | UNFLATTENS | EXPANDS | SLICES
SIZED |= NARROWS | TENSOR_SPLITS
SQUEEZES: set[Any] = {Tensor.squeeze, torch.squeeze}
REPEATS: set[Any] = {Tensor.repeat_interleave, torch.repeat_interleave}
MEETINGS: set[Any] = {Tensor.add, torch.add, Tensor.add_, Tensor.baddbmm, torch.baddbmm}
MEETINGS |= {Tensor.__add__, Tensor.__iadd__, Tensor.__radd__, functional.scaled_dot_product_attention}
"""Where a constant meets the scores of heads."""


class Numbers:
    """Numbers the calls of one forward: those of ``SIZED`` functions from 0 up; of ``MEETINGS`` of tensors,
    for batch norms add a number in one mode only, from -1 down; ``SQUEEZES`` without dimensions from 2^20 up.
    """

    def __init__(self) -> None:
        self._sized, self._meetings, self._squeezes = count(), count(-1, -1), count(1 << 20)

    def next(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """The number of this call; None for one of another function."""
        if func in MEETINGS and all(isinstance(x, Tensor) for x in args[:2]):
            return next(self._meetings)
        if func in SQUEEZES and len(args) + len(kwargs) == 1:
            return next(self._squeezes)
        return next(self._sized) if func in SIZED else None


def by_position(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A call of one of ``SIZED`` without keywords; as the slice or the split that it is if it has another
    name."""
    rank = {"input": 0, "tensor": 0, "dim": 1 if func in UNFLATTENS | NARROWS else 3, "length": 3}
    args += tuple(kwargs[name] for name in sorted(kwargs, key=lambda name: rank.get(name, 2)))
    if func in NARROWS and isinstance(args[2], int):
        x, dim, start, length = args
        before = [slice(None)] * (dim % x.dim())
        return Tensor.__getitem__, (x, (*before, slice(start, start + length or None)))
    if func in TENSOR_SPLITS and not isinstance(args[1], Tensor):
        x, cuts, dim = (*args, 0)[:3]
        whole = range(x.shape[dim])
        if isinstance(cuts, int):
            return torch.split, (x, [(len(whole) + i) // cuts for i in reversed(range(cuts))], dim)
        return torch.split, (x, [len(whole[a:b]) for a, b in pairwise((None, *cuts, None))], dim)
    return func, args


def indexed(x: Tensor, key: Any) -> list[tuple[int, int]]:
    """(place in the key, dimension of x) of every entry of ``x[key]`` but full slices."""
    keys = key if isinstance(key, tuple) else (key,)
    dims = [k for k in keys if k is not None and k is not Ellipsis]
    found, dim = [], 0
    for place, k in enumerate(keys):
        if k is Ellipsis:
            dim += x.dim() - len(dims)
        elif k is not None:
            found += [(place, dim)] if k != slice(None) else []
            dim += 1
    return found


def _sliced(x: Tensor, key: Any, fits: tuple[Fit, ...]) -> tuple[Any, ...]:
    """``x[key]`` with other bounds, where they are those that ``fits`` holds at the place of their slice.
    Raises ValueError: a bound is neither that nor what it becomes."""
    keys = list(key) if isinstance(key, tuple) else [key]
    for place, (start, stop) in enumerate(zip(fits[::2], fits[1::2], strict=True)):
        if start is not None or stop is not None:
            bounds = ((keys[place].start, start), (keys[place].stop, stop))
            if any(fit and (bound or 0) not in fit for bound, fit in bounds):
                raise ValueError("other bounds")
            keys[place] = slice(*(fit[1] if fit and bound == fit[0] else bound for bound, fit in bounds))
    return (x, tuple(keys))


def written_sizes(func: Callable[..., Any], args: tuple[Any, ...]) -> list[int] | None:
    """The sizes among the arguments of a call; None if it gives none that could be replaced."""
    place = 2 if func in UNFLATTENS else 1
    sizes = args[place:] if place == 1 and func not in SPLITS else args[place : place + 1]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return (
        [int(n) for n in sizes] if sizes and all(isinstance(n, (int, torch.SymInt)) for n in sizes) else None
    )


def _fitted(func: Callable[..., Any], args: tuple[Any, ...], fits: tuple[Fit, ...]) -> tuple[Any, ...]:
    """The arguments of the call with sizes that fit the tensor."""
    x = args[0]
    if func in SLICES:
        return _sliced(x, args[1], fits)
    if func in SQUEEZES:  # a single channel that is left is still a dimension
        return x, [d for d, fit in enumerate(fits) if fit is None and x.shape[d] == 1]
    place = 2 if func in UNFLATTENS else 1
    flat = args[place] if isinstance(args[place], (tuple, list)) else args[place:]
    if func in SPLITS:
        width = x.shape[args[2] if len(args) > 2 else 0]
        pieces = [fit[1] for fit in fits if fit is not None]
        return (x, pieces, *args[2:]) if sum(pieces) == width else args
    sizes = list(flat)
    if func in EXPANDS:
        shape = [1] * (len(sizes) - x.dim()) + list(x.shape)
        return (x, [_size(n, f) if have == 1 else -1 for n, f, have in zip(sizes, fits, shape, strict=True)])
    whole = x.shape[args[1]] if func in UNFLATTENS else x.numel()
    agree = all(fit is None or fit[0] or n in (fit[1], -1) for n, fit in zip(sizes, fits, strict=True))
    batch = place == 1 and fits[0] is None
    stale = batch and any(f and n == f[0] != f[1] for n, f in zip(sizes, fits, strict=True))
    if -1 not in sizes and prod(sizes) == whole and agree and not stale:  # the code follows its tensors
        return args
    sizes = [_size(n, fit) for n, fit in zip(sizes, fits, strict=True)]
    if batch and -1 not in sizes and prod(sizes) != whole:
        sizes[0] = -1  # a batch that the code found by dividing by its number of heads
    return (*args[:place], sizes)


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any], fits: tuple[Fit, ...]) -> tuple[Any, Any]:
    """The arguments with one of which only the positions of kept heads are left; see ``written_sizes``."""
    (place, _), *heads = (fit for fit in fits if fit is not None)
    values = [*args, *kwargs.values()]
    number, dim = divmod(place, PLACES)
    x = values[number]
    dim = x.dim() - 1 - dim
    if x.shape[dim] % len(heads) == 0:
        copies = x.unflatten(dim, (-1, len(heads))).unbind(dim + 1)  # an index would make a device wait
        kept = [copies[position] for position, alive in heads if alive]
        values[number] = torch.stack(kept, dim + 1).flatten(dim, dim + 1)
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _size(written: int, fit: Fit) -> int:
    if fit is None or written == -1:
        return written
    if not fit[0]:
        return fit[1]
    return written // fit[0] * fit[1] if written % fit[0] == 0 else written


class _Refit(TorchFunctionMode):
    def __init__(self, kind: str, calls: Mapping[int, tuple[Fit, ...]]) -> None:
        super().__init__()
        self.kind, self.calls, self.numbers = kind, calls, Numbers()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number = self.numbers.next(func, args, kwargs)
        fits = None if number is None else self.calls.get(number)
        if fits is None:
            return func(*args, **kwargs)
        try:
            if func in MEETINGS:
                args, kwargs = _chosen(args, kwargs, fits)
            else:
                func, args = by_position(func, args, kwargs)
                args, kwargs = _fitted(func, args, fits), {}
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"a {self.kind} takes a branch that the example inputs did not, or computes sizes that do "
                "not follow its channels; give example inputs that take it, or write a channel map by hand"
            ) from error
        if func in CHUNKS and not isinstance(args[1], int):
            func = torch.split  # parts that are no longer equal
        return func(*args, **kwargs)


class FittedForward:
    """Stands for the ``forward`` of a module whose code writes sizes, with its signature and code, which
    exporters read; ``calls`` has how they are replaced, by the number of the call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: dict[int, tuple[Fit, ...]] = {}

    @property
    def __signature__(self) -> Signature:
        return signature(partial(type(self.module).forward, self.module))

    @property
    def __code__(self) -> Any:
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Refit(type(self.module).__name__, self.calls):
            return type(self.module).forward(self.module, *args, **kwargs)


def fit_views(model: nn.Module, fits: Mapping[str, Mapping[int, tuple[Fit, ...]]]) -> None:
    """Let the modules that ``fits`` names run with these sizes, in place."""
    for name, calls in fits.items():
        module: Any = model.get_submodule(name)
        for layer in module.modules():
            drop_heads(layer)  # whose own calls were counted, and are others as long as all heads are there
        if not isinstance(module.__dict__.get("forward"), FittedForward):
            module.forward = FittedForward(module)
        module.forward.calls = dict(calls)


def fitted_views(model: nn.Module) -> Iterator[tuple[str, dict[int, tuple[Fit, ...]]]]:
    """What ``fit_views`` has set, by name of the module."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FittedForward):
            yield name, forward.calls
