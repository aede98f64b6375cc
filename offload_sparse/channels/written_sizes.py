"""Which sizes in a network's own code must follow its channels; see ``views`` for what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offload_sparse.channels.attention import HeadAttention
from offload_sparse.channels.channel_labels import compact, first, varying
from offload_sparse.channels.channel_map import ALWAYS, Axis, View
from offload_sparse.channels.propagation import Propagation
from offload_sparse.channels.views import (
    CHUNKS,
    EXPANDS,
    MEETINGS,
    PLACES,
    REPEATS,
    SLICES,
    SPLITS,
    SQUEEZES,
    UNFLATTENS,
    Numbers,
    by_position,
    indexed,
    written_sizes,
)


class Sizes(TorchFunctionMode):
    """Notes the calls that ``Numbers`` counts, and the module whose ``forward`` made them.

    Attributes:
        calls: (module, number of the call in this run of its forward, function, arguments, result).
        repeats: whether one of ``REPEATS`` runs.
        sequences: whether a linear layer was applied to each element of a sequence.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, Any, Any, Any, Any]] = []
        self.sequences = self.repeats = False
        self._stack: list[tuple[str, Numbers]] = []
        for name, module in network.named_modules():
            module.register_forward_pre_hook(self._entered(name), with_kwargs=True)
            module.register_forward_hook(self._left, always_call=True)

    def _entered(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._stack.append((name, Numbers()))
            self.sequences |= isinstance(module, nn.Linear) and [*given, *named.values()][0].dim() == 3

        return enter

    def _left(self, *_: Any) -> None:
        self._stack.pop()

    def place(self) -> str:
        """Name of the module that runs."""
        return self._stack[-1][0] if self._stack else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.repeats = func in REPEATS
        out = func(*args, **kwargs)
        self.repeats = False
        found = [numbers.next(func, args, kwargs) for _, numbers in self._stack]
        if found and found[-1] is not None:
            if func not in MEETINGS:
                func, args = by_position(func, args, kwargs)
                kwargs = {}
            self.calls.append((self.place(), found[-1], func, args, kwargs, out))
        return out


class _UnfitError(Exception):
    """No size can be put in place of a written one."""


def fitted_calls(
    network: nn.Module, found: Propagation, calls: list[Any], ids: Tensor
) -> tuple[dict[str, tuple[View, ...]], list[tuple[Axis, ...]]] | None:
    """The calls to fit, by module, and the atoms of the parts of each width that is split; None if some call
    cannot be fitted, whose labels are now dense.

    Args:
        found: the labels of its tensors.
        ids: int64[labels + 1], the atom of each label; the last serves -1."""
    views: dict[str, dict[int, View]] = {}
    seen: dict[tuple[str, int], Any] = {}
    parts: list[tuple[Axis, ...]] = []
    good = True
    constants = {
        (id(x), place): (dim, ids[met])
        for x, dim, met, place in found.constants
        if bool((ids[met] >= 0).any())
    }
    unmet = set(constants)
    for name, call, func, args, kwargs, out in calls:
        if isinstance(network.get_submodule(name), HeadAttention):
            continue
        labelled = out if isinstance(out, Tensor) and func not in SLICES else args[0]
        if not any(bool((ids[compact(c)] >= 0).any()) for c in found.of(labelled)):
            continue
        try:
            if func in MEETINGS:
                of_module = {key[0]: met for key, met in constants.items() if key[1] == name}
                view = _meeting(call, [*args, *kwargs.values()], of_module)
                unmet -= {(id(x), name) for x in [*args, *kwargs.values()]} if view else set()
            else:
                view = _view(found, call, func, args, out, ids)
            form = view and (view.sizes, [None if a is None else a.tolist() for a in view.axes])
            if seen.setdefault((name, call), form) != form:
                raise _UnfitError
        except _UnfitError:
            found.keep(labelled, f"sizes written in {name}")
            good = False
            continue
        if view is not None:
            views.setdefault(name, {})[call] = view
            parts += [view.axes] if func in SPLITS else []
    for x, _, met, place in found.constants:
        if (id(x), place) in unmet:  # in a call whose arguments cannot be changed
            found.dense.append((met, "a constant"))
            good = False
    return ({name: tuple(found.values()) for name, found in views.items()}, parts) if good else None


def _meeting(call: int, values: list[Any], constants: dict[int, tuple[int, Tensor]]) -> View | None:
    """How a constant among the arguments of a call is fitted: its place, then each position and its atom."""
    for number, x in enumerate(values):
        if id(x) in constants:
            dim, axis = constants[id(x)]
            place = number * PLACES + x.dim() - 1 - dim
            atoms = _period(axis).split(1)
            return View(call, (place, *range(len(atoms))), (axis[:0], *atoms))
    return None


def _view(found: Propagation, call: int, func: Any, args: Any, out: Any, ids: Tensor) -> View | None:
    """How the sizes of one call are fitted; None if there is no need."""
    if func in SLICES:
        return _slice(found, call, args[0], args[1], ids)
    if func in SQUEEZES:
        own = _axes_of(found, args[0], ids)
        return View(call, (0,) * args[0].dim(), tuple(own.get(d) for d in range(args[0].dim())))
    written = written_sizes(func, args)
    if written is None:
        return None
    if func in SPLITS:
        dim = args[2] if len(args) > 2 else 0
        given = [_axes_of(found, piece, ids).get(dim % args[0].dim()) for piece in out]
        widths = [piece.shape[dim] for piece in out]
        if all(axis is None for axis in given):
            return None
        whole = [torch.full((n,), ALWAYS) if a is None else a for n, a in zip(widths, given, strict=True)]
        if func in CHUNKS and all(torch.equal(axis, whole[0]) for axis in whole):
            return None  # parts that stay equal
        return View(call, tuple(widths), tuple(whole))
    axes = _axes_of(found, out, ids)
    start = args[1] % args[0].dim() if func in UNFLATTENS else 0
    dims = range(start, start + len(written))
    if all(written[d - start] == -1 for d in dims if d in axes):
        return None
    sizes, fits = [0] * len(written), [axes.get(d) for d in dims]
    for i, axis in enumerate(list(fits)):
        if axis is not None:
            fits[i] = period = _period(axis)
            sizes[i] = len(period)
            if func in EXPANDS and ((1,) * (out.dim() - args[0].dim()) + args[0].shape)[dims[i]] == 1:
                continue  # copies
            for j in range(i + 1, _end_of_group(args[0].shape, out.shape, dims[i]) - start):
                fits[j] = torch.full((out.shape[dims[j]],), ALWAYS)
    return View(call, tuple(sizes), tuple(fits))


def _slice(found: Propagation, call: int, x: Tensor, key: Any, ids: Tensor) -> View | None:
    """The same for ``x[key]``: two bounds per entry of the key."""
    axes = _axes_of(found, x, ids)
    if not axes:
        return None
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, Tensor) or (isinstance(k, list) and len(k) != 1) for k in keys):
        raise _UnfitError
    sizes: list[int] = [0] * 2 * len(keys)
    fits: list[Axis] = [None for _ in sizes]
    for place, dim in indexed(x, key):
        chosen, axis = keys[place], axes.get(dim)
        if axis is None:
            continue
        if isinstance(chosen, list) and chosen[0] < 0 and bool((axis[chosen[0] :] == ALWAYS).all()):
            continue  # counted from an end that stays
        if not isinstance(chosen, slice) or chosen.step is not None:
            raise _UnfitError
        start, stop, _ = chosen.indices(len(axis))
        sizes[2 * place : 2 * place + 2] = chosen.start or 0, chosen.stop or 0
        fits[2 * place : 2 * place + 2] = axis[:start].clone(), axis[:stop].clone()
    return View(call, tuple(sizes), tuple(fits)) if any(a is not None for a in fits) else None


def _axes_of(found: Propagation, tensor: Tensor, ids: Tensor) -> dict[int, Tensor]:
    """The atoms along each dimension that has some."""
    axes: dict[int, Tensor] = {}
    for labels in found.of(tensor):
        atoms = ids[compact(labels)].expand(labels.shape)
        along = varying(atoms)
        if len(along) == 1 and not along & set(axes):
            (dim,) = along
            axes[dim] = first(atoms, dim).clone()
        elif along or bool((compact(atoms) >= 0).any()):
            raise _UnfitError  # a single atom, or one that depends on two dimensions
    return axes


def _period(axis: Tensor) -> Tensor:
    """The shortest run whose repetitions give ``axis``: heads within a batch that was merged with them."""
    n = len(axis)
    runs = (axis[:p] for p in range(1, n + 1) if n % p == 0 and torch.equal(axis[:p].repeat(n // p), axis))
    return next(runs)


def _end_of_group(before: torch.Size, after: torch.Size, dim: int) -> int:
    """The dimension of ``after`` behind those that come from the same dimensions of ``before`` as ``dim``."""
    products = {prod(before[:i]) for i in range(len(before) + 1)}
    return next((j for j in range(dim + 1, len(after)) if prod(after[:j]) in products), len(after))
