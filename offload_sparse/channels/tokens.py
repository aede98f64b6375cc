"""Channel maps of networks that work on tokens: whole attention heads and the widths of MLPs.

Their stream stays dense, since norms mix all of its channels. What goes with a head or a hidden channel
follows from the data (see ``propagation``), in both modes of the network; calls whose sizes are written in
its code are noted along the way (see ``views``).
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from offload_sparse.channels.attention import HeadAttention, can_drop_heads
from offload_sparse.channels.channel_map import ALWAYS, Axis, ChannelMap, Group, View
from offload_sparse.channels.model_call import (
    Inputs,
    disable_dropout,
    enlarge_inputs,
    move_inputs,
    operations,
)
from offload_sparse.channels.propagation import Propagation, compact, varying
from offload_sparse.channels.subnet import hollow_copy, is_norm, meta_copy
from offload_sparse.channels.views import CHUNKS, SLICES, SPLITS, UNFLATTENS, Sizes, indexed, written_sizes

logger = logging.getLogger(__name__)


def works_on_tokens(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a network looks tokens up, has attention, or applies linear layers to each of a sequence."""
    if any(isinstance(m, (nn.Embedding, nn.MultiheadAttention)) for m in model.modules()):
        return True
    found: list[bool] = []
    done: list[str] = []
    network = meta_copy(model, other=True)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: found.append(given[0].dim() == 3))
    try:
        done = operations(network, move_inputs(inputs, "meta"), False)
    except Exception:  # Torch-Pruning says what is wrong
        return False
    return any(found) or ("bmm" in done and any("softmax" in name for name in done))


def token_map(model: nn.Module, example_inputs: Inputs) -> ChannelMap:
    """The map of a network that works on tokens; the model is left untouched.

    Raises:
        ValueError: the model cannot be traced, or nothing of it can be dropped; names a layer and the reason.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            return _Trace(*_run(model, example_inputs)).map()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _run(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Propagation, list[Any]]:
    """Both modes of a copy on meta, or of a hollow one for a model that looks at values of its inputs."""
    inputs = enlarge_inputs(inputs, 2)
    try:
        return _run_copy(meta_copy(model, other=True), move_inputs(inputs, "meta"))
    except Exception:  # a meta tensor has no values
        pass
    try:
        return _run_copy(hollow_copy(model), move_inputs(inputs, "cpu"))
    except Exception as error:
        raise _not_traceable(model, error) from error


def _not_traceable(model: nn.Module, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValueError(
        f"{type(model).__name__} cannot be traced ({reason}); give example inputs that it accepts"
    )


def _run_copy(network: nn.Module, inputs: Inputs) -> tuple[nn.Module, Propagation, list[Any]]:
    disable_dropout(network)
    for module in network.modules():
        if can_drop_heads(module):
            module.__class__ = HeadAttention  # what it becomes when heads are dropped
    names = {n for n, m in network.named_modules() if is_norm(m)}
    norms = {n: b for n, b in network.named_buffers() if n.rpartition(".")[0] in names and b.dim()}
    tensors = {n: t for n, t in [*network.named_parameters(), *norms.items()] if t.is_floating_point()}
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    sizes = Sizes(network)
    propagation = Propagation(tensors, leaves, sizes.place)
    with propagation, sizes:
        for training in (False, True):
            for x in pytree.tree_leaves(network.train(training)(*inputs)):
                propagation.keep(x, "the output")
    sizes.remove()
    return network, propagation, sizes.calls


class _UnfitError(Exception):
    """No size can be put in place of a written one."""


class _Trace:
    """From labels to atoms."""

    def __init__(self, network: nn.Module, propagation: Propagation, calls: list[Any]) -> None:
        self._network, self._found, self._calls = network, propagation, calls

    def map(self) -> ChannelMap:
        """The map.

        Raises:
            ValueError: nothing can be dropped.
        """
        views: dict[str, dict[int, View]] | None = None
        while views is None:  # sizes that cannot be fitted make labels dense, so atoms are numbered anew
            groups, ids = self._atoms()
            if not groups:
                raise self._refusal()
            views = self._views(ids)
        tensors = [*self._network.named_parameters(), *self._network.named_buffers()]
        shapes = {name: tuple(t.shape) for name, t in tensors if t.is_floating_point()}
        axes: dict[str, list[Axis]] = {name: [None] * len(shape) for name, shape in shapes.items()}
        for start, name, dim in self._found.starts:
            axis = ids[start : start + shapes[name][dim]]
            if bool((axis >= 0).any()):
                axes[name][dim] = axis.clone()
        listed = {name: tuple(calls.values()) for name, calls in views.items() if calls}
        return ChannelMap(groups, shapes, {n: tuple(a) for n, a in axes.items()}, views=listed)

    def _atoms(self) -> tuple[tuple[Group, ...], Tensor]:
        """The groups, and int64[labels + 1], the atom of each label; the last serves -1."""
        found = self._found
        root = found.roots()
        free = torch.zeros(found.size, dtype=torch.bool)
        free[root[torch.cat(found.consumed)]] = True
        for labels, _ in found.dense:
            free[root[labels]] = False
        parameters = dict(self._network.named_parameters())
        groups: list[Group] = []
        atom = torch.full((found.size + 1,), ALWAYS)
        for start, name, dim in found.starts:
            stop = start + (parameters[name].shape[dim] if name in parameters else 0)
            own = start + free[start:stop].nonzero().flatten()
            if len(own) > 1:  # the only channel of a width is never dropped
                first = groups[-1].stop if groups else 0
                groups.append(Group(name.removesuffix(".weight"), first, len(own)))
                atom[own] = torch.arange(first, first + len(own))
        return tuple(groups), atom[root]

    def _views(self, ids: Tensor) -> dict[str, dict[int, View]] | None:
        """The calls to fit, by module and number; None if some cannot be, whose labels are now dense."""
        views: dict[str, dict[int, View]] = {}
        seen: dict[tuple[str, int], Any] = {}
        good = True
        for name, call, func, args, kwargs, out in self._calls:
            if isinstance(self._network.get_submodule(name), HeadAttention):
                continue
            labelled = out if isinstance(out, Tensor) and func not in SLICES else args[0]
            if not any(bool((ids[compact(c)] >= 0).any()) for c in self._found.of(labelled)):
                continue
            try:
                view = self._view(call, func, args, kwargs, out, ids)
                form = view and (view.sizes, [None if a is None else a.tolist() for a in view.axes])
                if seen.setdefault((name, call), form) != form:
                    raise _UnfitError
            except _UnfitError:
                self._found.keep(labelled, f"sizes written in {name}")
                good = False
                continue
            if view is not None:
                views.setdefault(name, {})[call] = view
        return views if good else None

    def _view(self, call: int, func: Any, args: Any, kwargs: Any, out: Any, ids: Tensor) -> View | None:
        """How the sizes of one call are fitted; None if there is no need."""
        if func in SLICES:
            return self._slice(call, args[0], args[1], ids)
        written = written_sizes(func, args)
        if written is None:
            return None
        if func in SPLITS:
            dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            given = [self._axes_of(piece, ids).get(dim % args[0].dim()) for piece in out]
            widths = [piece.shape[dim] for piece in out]
            if all(axis is None for axis in given):
                return None
            whole = [torch.full((n,), ALWAYS) if a is None else a for n, a in zip(widths, given, strict=True)]
            if func in CHUNKS and all(torch.equal(axis, whole[0]) for axis in whole):
                return None  # parts that stay equal
            return View(call, tuple(widths), tuple(whole))
        axes = self._axes_of(out, ids)
        first = args[1] % args[0].dim() if func in UNFLATTENS else 0
        dims = range(first, first + len(written))
        if all(written[d - first] == -1 for d in dims if d in axes):
            return None
        sizes, found = [0] * len(written), [axes.get(d) for d in dims]
        for i, axis in enumerate(list(found)):
            if axis is not None:
                found[i] = _period(axis)
                sizes[i] = len(_period(axis))
                for j in range(i + 1, _end_of_group(args[0].shape, out.shape, dims[i]) - first):
                    found[j] = torch.full((out.shape[dims[j]],), ALWAYS)
        return View(call, tuple(sizes), tuple(found))

    def _slice(self, call: int, x: Tensor, key: Any, ids: Tensor) -> View | None:
        """The same for ``x[key]``: two bounds per entry of the key."""
        axes = self._axes_of(x, ids)
        if not axes:
            return None
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, (Tensor, list)) for k in keys):
            raise _UnfitError
        sizes: list[int] = [0] * 2 * len(keys)
        found: list[Axis] = [None for _ in sizes]
        for place, dim in indexed(x, key):
            if dim in axes:
                chosen, width = keys[place], len(axes[dim])
                if not isinstance(chosen, slice) or chosen.step is not None:
                    raise _UnfitError
                sizes[2 * place : 2 * place + 2] = chosen.start or 0, chosen.stop or 0
                start, stop, _ = chosen.indices(width)
                found[2 * place : 2 * place + 2] = axes[dim][:start].clone(), axes[dim][:stop].clone()
        return View(call, tuple(sizes), tuple(found)) if any(a is not None for a in found) else None

    def _axes_of(self, tensor: Tensor, ids: Tensor) -> dict[int, Tensor]:
        """The atoms along each dimension that has some."""
        axes: dict[int, Tensor] = {}
        for labels in self._found.of(tensor):
            atoms = ids[compact(labels)].expand(labels.shape)
            along = varying(atoms)
            if len(along) == 1 and not along & set(axes):
                (dim,) = along
                axes[dim] = atoms[tuple(slice(None) if d == dim else 0 for d in range(atoms.dim()))].clone()
            elif along or bool((compact(atoms) >= 0).any()):
                raise _UnfitError  # a single atom, or one that depends on two dimensions
        return axes

    def _refusal(self) -> ValueError:
        found = self._found
        root = found.roots()
        usual = (
            "a layer norm",
            "an RMS norm",
            "the output",
            "a residual addition",
            "a table",
            "mean",
            "a constant",
        )
        for name, layer in self._network.named_modules():
            start = next((s for s, n, d in found.starts if n == f"{name}.weight" and d == 0), None)
            if isinstance(layer, nn.Linear) and start is not None:
                for labels, reason in found.dense:
                    if bool((root[labels] == root[start]).any()) and not reason.startswith(usual):
                        return _refused(self._network, f"{name} meets {reason}", name)
        linear = [n for n, m in self._network.named_modules() if isinstance(m, nn.Linear)]
        return _refused(
            self._network, "all of them reach an output or a stream that stays dense", *linear[:1]
        )


def _refused(network: nn.Module, reason: str, layer: str = "first") -> ValueError:
    return ValueError(
        f"no channel of {type(network).__name__} can be dropped: {reason}; write a channel map by hand, as "
        f"builder = MapBuilder(model); builder.width(('{layer}',), 'its reader'); channel_map=builder.build()"
    )


def _period(axis: Tensor) -> Tensor:
    """The shortest run whose repetitions give ``axis``: heads within a batch that was merged with them."""
    n = len(axis)
    runs = (axis[:p] for p in range(1, n + 1) if n % p == 0 and torch.equal(axis[:p].repeat(n // p), axis))
    return next(runs)


def _end_of_group(before: torch.Size, after: torch.Size, dim: int) -> int:
    """The dimension of ``after`` behind those that come from the same dimensions of ``before`` as ``dim``."""
    products = {prod(before[:i]) for i in range(len(before) + 1)}
    return next((j for j in range(dim + 1, len(after)) if prod(after[:j]) in products), len(after))
