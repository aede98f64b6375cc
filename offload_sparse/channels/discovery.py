"""From a network to its ChannelMap: which channels can be dropped, and what goes with each.

    network ── both modes, on meta ──▶ labels tied by the data ──▶ classes ──▶ atoms, groups, axes

A class of labels (see ``propagation``) is an atom if a layer reads it and nothing says that it must be kept:
the network's output, an operation that mixes it with others, or the residual policy. What is not understood
is kept; slice = mask (see ``check``) is tested all the same before anything trains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from offload_sparse.channels.attention import drop_heads
from offload_sparse.channels.channel_map import ALWAYS, Axis, ChannelMap, Group
from offload_sparse.channels.config import Residual
from offload_sparse.channels.model_call import (
    Inputs,
    NoDropout,
    attention_in_products,
    enlarge_inputs,
    output_tensors,
)
from offload_sparse.channels.propagation import Propagation
from offload_sparse.channels.stream_add import additions, expose_additions
from offload_sparse.channels.subnet import is_norm, on_copy, output_dimension
from offload_sparse.channels.unions import follow_additions
from offload_sparse.channels.written_sizes import Sizes, fitted_calls

logger = logging.getLogger(__name__)

_LEAST_PART = 1 / 8
"""Where a network splits what it has shuffled again and again, the runs become shorter and shorter."""

_STREAM = ("a layer norm", "a residual addition", "a table", "mean", "a constant")


def discover(model: nn.Module, example_inputs: Inputs, residual: Residual = "coupled") -> ChannelMap:
    """Find the atoms of a network, which is left untouched.

    The stream of a network on tokens stays dense whatever ``residual`` says, since norms mix all of its
    channels. Raises ValueError: the model cannot be traced, or nothing of it can be dropped; names a layer
    and the reason.

    Args:
        model: the network, on any device (``meta`` included).
        example_inputs: positional inputs, nested as the network likes; only its own values may matter to it.
        residual: ``coupled`` gives each residual stream one group of atoms; ``internal`` keeps streams dense;
            ``filter`` gives every layer on a stream a group of its own (the map then names the additions)."""
    if residual not in ("coupled", "internal", "filter"):
        raise ValueError(f"residual is {residual!r}; choose coupled, internal or filter")
    trace = _follow(model, example_inputs, residual == "filter")
    if trace.on_tokens and residual != "internal":
        logger.warning("residual: internal for %s, whose norms mix its stream", type(model).__name__)
        trace = _follow(model, example_inputs, False) if residual == "filter" else trace
        residual = "internal"
    return _map(trace, residual)


def policies(model: nn.Module, example_inputs: Inputs) -> tuple[Residual, ...]:
    """The residual policies that differ for ``model``: the stream of a network on tokens is always dense.
    Raises ValueError: the model cannot be traced."""
    on_tokens = _follow(model, example_inputs, False).on_tokens
    return ("internal",) if on_tokens else ("coupled", "internal", "filter")


@dataclass(frozen=True)
class _Trace:
    """A copy of the network, the labels that followed its data, and its calls with written sizes."""

    network: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    found: Propagation
    sizes: Sizes

    @property
    def on_tokens(self) -> bool:
        """Whether it looks tokens up, has attention, or applies linear layers to each of a sequence."""
        if any(isinstance(m, (nn.Embedding, nn.MultiheadAttention)) for m in self.network.modules()):
            return True
        done = self.found.operations
        return self.sizes.sequences or ("bmm" in done and any("softmax" in name for name in done))


def _follow(model: nn.Module, inputs: Inputs, separate: bool) -> _Trace:
    """Both modes of a copy; with ``separate``, the operands of additions are left untied."""
    inputs = enlarge_inputs(inputs, 2)  # in training mode, a batch norm wants two values
    try:
        with torch.inference_mode(), attention_in_products():
            return on_copy(model, inputs, partial(_run, separate=separate))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({reason}); give example inputs that it accepts"
        ) from error


def _run(network: nn.Module, inputs: Inputs, *, separate: bool) -> _Trace:
    given = [*network.named_parameters(), *network.named_buffers()]  # before a forward changes them
    shapes = {name: tuple(t.shape) for name, t in given if t.is_floating_point()}
    if separate:  # as it will be built: with its dropout
        expose_additions(network.eval(), inputs=inputs)
    for module in network.modules():
        drop_heads(module)  # as it will be when some are
    names = {n for n, m in network.named_modules() if is_norm(m)}
    norms = {n: b for n, b in network.named_buffers() if n.rpartition(".")[0] in names and b.dim()}
    tensors = {n: t for n, t in [*network.named_parameters(), *norms.items()] if t.is_floating_point()}
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    sizes = Sizes(network)
    groups = ((n, m) for n, m in network.named_modules() if isinstance(m, nn.GroupNorm))
    group_norms = {name for name, norm in groups if norm.affine and norm.num_groups > 1}
    found = Propagation(tensors, leaves, sizes.place, lambda: sizes.repeats, group_norms)
    for name, add in additions(network):
        add.forward = partial(found.add, name)  # type: ignore[method-assign]
    with found, sizes, NoDropout(network):
        for training in (False, True):
            found.added.clear()
            for x in output_tensors(network.train(training)(*inputs)):
                found.keep(x, "the output")
    return _Trace(network, shapes, found, sizes)


def _map(trace: _Trace, residual: Residual) -> ChannelMap:
    """The map of what is free. Raises ValueError: nothing can be dropped, or a stream cannot be followed with
    ``filter``."""
    network, found = trace.network, trace.found
    if residual == "internal":
        found.dense += [(labels, "a residual addition") for labels, _ in found.streams]
    producers, fitted = set() if trace.on_tokens else _producers(network), None
    while fitted is None:  # sizes that cannot be fitted make labels dense, so atoms are numbered anew
        groups, atoms = _atoms(found, producers)
        if not groups:
            raise _refusal(network, found)
        if residual == "filter":
            _refuse_other_additions(found, atoms[found.roots()])
        atoms, unions, sums = follow_additions(
            found.sums, found.roots(), _dense(found), atoms, groups[-1].stop
        )
        ids = atoms[found.roots()]
        fitted = fitted_calls(network, found, trace.sizes.calls, ids)
    views, splits = fitted
    members = torch.stack([unions[0] + groups[-1].stop, unions[1]])
    groups = tuple(part for group in groups for part in _divided(group, splits, members))
    shapes = trace.shapes
    axes: dict[str, list[Axis]] = {name: [None] * len(shape) for name, shape in shapes.items()}
    for start, name, dim in found.starts:
        axis = ids[start : start + shapes[name][dim]] if name in shapes else ids[:0]
        if bool((axis >= 0).any()):
            axes[name][dim] = axis
    return ChannelMap(groups, shapes, _share_equal(axes), unions, sums, views)


def _divided(group: Group, splits: Sequence[Sequence[Axis]], members: Tensor) -> Iterator[Group]:
    """A group as the network splits it: each part is a width of its own, which is never empty. Parts that are
    no runs of atoms, or smaller than ``_LEAST_PART`` of the channels, stay together.

    Args:
        splits: the atoms or unions in the parts of each width that is split.
        members: int64[2, members], pairs (id of a union, atom).
    """
    cuts = {0, group.size}
    for parts in splits:
        part_of, channels = torch.full((group.size,), -1), torch.zeros(group.size, dtype=torch.int64)
        for number, ids in enumerate(parts):
            assert ids is not None, "a part of a split has an axis"
            atoms = torch.cat([ids, members[1, torch.isin(members[0], ids)]]) - group.start
            atoms = atoms[(atoms >= 0) & (atoms < group.size)]
            part_of[atoms] = number
            channels += atoms.bincount(minlength=group.size)
        runs, lengths = part_of.unique_consecutive(return_counts=True)
        more = cuts | set(lengths.cumsum(0).tolist())
        channels.clamp_(1)  # an atom that is elsewhere
        sizes = [channels[start:stop] for start, stop in pairwise(sorted(more))]
        large = all(len(n) > 1 and int(n.sum()) >= _LEAST_PART * int(channels.sum()) for n in sizes)
        if len(runs) == len(part_of.unique()) and large:
            cuts = more
    for start, stop in pairwise(sorted(cuts)):
        name = group.name if len(cuts) == 2 else f"{group.name}[{start}:{stop}]"
        yield Group(name, group.start + start, stop - start, group.shared)


def _share_equal(axes: Mapping[str, list[Axis]]) -> dict[str, tuple[Axis, ...]]:
    """The same axes, with one tensor for all that are equal: a norm's four vectors name the same atoms."""
    first: dict[bytes, Tensor] = {}
    return {
        name: tuple(None if a is None else first.setdefault(a.numpy().tobytes(), a.clone()) for a in given)
        for name, given in axes.items()
    }


def _producers(network: nn.Module) -> set[tuple[str, int]]:
    """(weight, dimension) of the outputs of linear layers and convolutions; depthwise ones have none."""
    found = set()
    for name, module in network.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, nn.Linear):
            found.add((weight, 0))
        elif (
            isinstance(module, _ConvNd) and not 1 < module.groups == module.in_channels == module.out_channels
        ):
            found.add((weight, output_dimension(module)))
    return found


def _atoms(found: Propagation, producers: set[tuple[str, int]]) -> tuple[tuple[Group, ...], Tensor]:
    """The groups, and int64[labels + 1], the atom of the class that each label is the smallest of.

    Atoms are numbered by the first layer that produces them; those that none does, by their first tensor.
    """
    root = found.roots()
    free = _classes(found, found.consumed) & ~_dense(found)
    starts = torch.tensor([start for start, _, _ in found.starts])
    width = starts.diff(append=torch.tensor([found.size]))
    produced = torch.tensor([(name, dim) in producers for _, name, dim in found.starts])
    later = torch.where(produced, 0, found.size).repeat_interleave(width)
    first = torch.full((found.size + 1,), 2 * found.size)
    first.scatter_reduce_(0, root[:-1], torch.arange(found.size) + later, "amin")
    for _, _, total in found.sums.values():  # what an addition gives is made of atoms, and none itself
        free[root[total]] &= first[root[total]] < found.size
    classes = free[:-1].nonzero().flatten()
    place, order = (first[classes] % found.size).sort()
    owner = torch.searchsorted(starts, place, right=True) - 1
    shared = _classes(found, found.shared)
    groups: list[Group] = []
    atoms = torch.full((found.size + 1,), ALWAYS)
    for number, size in zip(*(x.tolist() for x in owner.unique_consecutive(return_counts=True)), strict=True):
        if size > 1:  # the only channel of a width is never dropped
            stop = groups[-1].stop if groups else 0
            own = classes[order[owner == number]]
            name = found.starts[number][1].removesuffix(".weight")
            groups.append(Group(name, stop, size, bool(shared[own].any())))
            atoms[own] = torch.arange(stop, stop + size)
    return tuple(groups), atoms


def _dense(found: Propagation) -> Tensor:
    """bool[labels + 1], the classes that must be kept."""
    return _classes(found, (labels for labels, _ in found.dense))


def _classes(found: Propagation, labels: Iterable[Tensor]) -> Tensor:
    """bool[labels + 1], those that some of ``labels`` (int64[...] each) belong to, and the last."""
    among = torch.zeros(found.size + 1, dtype=torch.bool)
    among[found.roots()[torch.cat([torch.tensor([-1]), *(x.flatten() for x in labels)])]] = True
    return among


def _refuse_other_additions(found: Propagation, ids: Tensor) -> None:
    """Refuse sums of sampled channels that were not exposed: their operands would have to share a mask."""
    for labels, place in found.streams:
        if bool((ids[labels] >= 0).any()):
            raise ValueError(
                f"the addition in {place or 'the network'} is in a forward that torch.fx cannot trace, "
                "that depends on the training mode or that runs twice, or it adds tensors of two shapes, or "
                "in place to what is read again; use residual=coupled or residual=internal"
            )


def _refusal(network: nn.Module, found: Propagation) -> ValueError:
    root, layers = found.roots(), dict(network.named_modules())
    linear = [n for n, m in layers.items() if isinstance(m, (nn.Linear, _ConvNd))]
    for usual in (("the output", *_STREAM), ("the output", "a residual addition")):
        for start, name, dim in found.starts:
            layer = name.partition(".parametrizations")[0].removesuffix(".weight")
            for labels, reason in found.dense if layer in linear and not dim else ():
                if not reason.startswith(usual) and bool((root[labels] == root[start]).any()):
                    return _refused(network, f"{layer} meets {reason}", layer)
    return _refused(network, "all of them reach an output or a stream that stays dense", *linear[:1])


def _refused(network: nn.Module, reason: str, layer: str = "first") -> ValueError:
    return ValueError(
        f"no channel of {type(network).__name__} can be dropped: {reason}; write a channel map by hand, as "
        f"builder = MapBuilder(model); builder.width(('{layer}',), 'its reader'); channel_map=builder.build()"
    )
