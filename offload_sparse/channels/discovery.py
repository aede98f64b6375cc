"""From a network to its ChannelMap: which channels can be dropped, and what goes with each.

Networks that work on tokens are followed by ``tokens``. For others Torch-Pruning's dependency graph is the
source (see ``closures``): each class of channels that it ties together is an atom, unless it reaches the
network's input or output. Nothing here proves that graph right: operations that are not known to preserve
channels are refused by name, and ``check`` compares slice and mask before anything trains.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from offload_sparse.channels import specs
from offload_sparse.channels.channel_map import Axis, ChannelMap, Group
from offload_sparse.channels.closures import (
    STRIDE,
    Closures,
    TimeLimitError,
    TracedNetwork,
    alarm,
    channel_closures,
    is_depthwise,
    is_grouped,
    is_output,
    is_producer,
    trace,
)
from offload_sparse.channels.config import Residual
from offload_sparse.channels.model_call import Inputs
from offload_sparse.channels.subnet import is_norm
from offload_sparse.channels.tokens import token_map, works_on_tokens
from offload_sparse.channels.unions import follow_additions

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LAYERS = (_ConvNd, nn.Linear)

_CHANNEL_PRESERVING = re.compile(
    r"(Relu|Relu6|LeakyRelu|RreluWithNoise|Elu|Celu|Selu|Gelu|Silu|Mish|Hardtanh|Hardswish|Hardsigmoid|Sigmoid|LogSigmoid|"
    r"Tanh|Softplus|Threshold|Clamp\w*|Minimum|Maximum|Add|Sub|Rsub|Mul|Div|Neg|Pow|Square|Sqrt|Rsqrt|Exp|Abs|Erf|Addcmul|MaskedFill|Where|"
    r"Mean|Sum|\w*Pool\w*|Upsample\w*|\w*BatchNorm|NativeDropout|Clone|Copy|ToCopy|Alias|AsStrided|Contiguous|"
    r"Squeeze|Unsqueeze|Permute|Transpose|T|ConstantPadNd|ReflectionPad\w*|ReplicationPad\w*|\w*Convolution\w*|Addmm)"
)
"""Autograd operations for which position i of the output depends on position i of each input only (or on
weights)."""

_ADVICE = "use residual=internal if it sits on a residual stream, or write a channel map by hand"


def discover(
    model: nn.Module,
    example_inputs: Inputs,
    residual: Residual = "coupled",
    time_limit: float = 60.0,
) -> ChannelMap:
    """Find the atoms of a network of convolutions, linear layers and batch norms. The model is left
    untouched. A network that there is a spec for (see ``specs``) gets the map of the spec.

    Args:
        model: the network, on any device (``meta`` included).
        example_inputs: positional inputs, nested as the network likes; only its own values may matter to it.
        residual: ``coupled`` gives each residual stream one group of atoms; ``internal`` keeps streams dense;
            ``filter`` gives every layer on a stream a group of its own (the map then names the additions).
        time_limit: seconds.

    Raises:
        ValueError: the model cannot be traced, holds something whose channels cannot be followed (named in
            the message), or takes longer than ``time_limit``.
    """
    if residual not in ("coupled", "internal", "filter"):
        raise ValueError(f"residual is {residual!r}; choose coupled, internal or filter")
    written = specs.find(model)
    if written is not None:
        return written
    deadline = time.monotonic() + time_limit
    if policies(model, example_inputs, time_limit) == ("internal",):
        if residual != "internal":
            logger.warning("residual: internal for %s, whose norms mix its stream", type(model).__name__)
        return _within(time_limit, model, lambda: token_map(model, example_inputs))
    _refuse_shared_parameters(model)

    def follow() -> tuple[TracedNetwork, Closures]:
        wrapper, graphs = trace(model, example_inputs, residual == "filter")
        return wrapper, channel_closures(*graphs, deadline=deadline)

    wrapper, closures = _within(time_limit, model, follow)
    stubs = {module for add in wrapper.sums.values() for module in add.modules()}
    names = {module: name for name, module in wrapper.network.named_modules() if module not in stubs}
    dense = _kept_dense(closures, wrapper, residual)
    atom_of_class, groups = _number_atoms(closures, names, dense)
    if not groups:
        raise ValueError(
            f"no channel of {type(model).__name__} can be dropped with residual={residual}: all of them "
            f"reach an input, "
            "an output or a stream that stays dense; choose another model or residual policy"
        )
    ids, unions, sums = follow_additions(closures, wrapper.sums, atom_of_class, dense, groups[-1].stop)
    _refuse_unknown(closures, ids, names, _parameter_names(wrapper.network))
    if residual == "filter":
        _refuse_other_additions(closures, ids, names)
    shapes, axes = _axes(model, closures, ids, names)
    return ChannelMap(groups, shapes, axes, unions, sums)


def policies(model: nn.Module, example_inputs: Inputs, time_limit: float = 60.0) -> tuple[Residual, ...]:
    """The residual policies that differ for ``model``: the stream of a network on tokens is always dense.

    Raises:
        ValueError: it takes longer than ``time_limit`` seconds.
    """
    if specs.find(model) is not None or _within(
        time_limit, model, lambda: works_on_tokens(model, example_inputs)
    ):
        return ("internal",)
    return ("coupled", "internal", "filter")


def _within(time_limit: float, model: nn.Module, follow: Callable[[], T]) -> T:
    try:
        with alarm(time_limit):
            return follow()
    except TimeLimitError as error:
        raise ValueError(
            f"discovery of {type(model).__name__} did not finish in {time_limit:g} s; raise the time limit, "
            "or write a channel map by hand"
        ) from error


def _kept_dense(closures: Closures, wrapper: TracedNetwork, residual: str) -> Tensor:
    """bool[classes]: classes that reach an input, an output or, for ``internal``, a residual addition."""
    stubs = set(wrapper.stubs)
    dense = torch.zeros(closures.classes, dtype=torch.bool)
    for index, (node, _) in enumerate(closures.states):
        at_border = node.module in stubs or isinstance(node.module, torch_pruning.ops._OutputOp)
        if at_border or (residual == "internal" and _joins_producers(node)):
            dense[closures.label[closures.of(index)]] = True
    return dense


def _joins_producers(node: Any) -> bool:
    """Whether this is an addition of branches that come from different convolutions or linear layers."""
    if not re.fullmatch(r"(Add|Sub|Rsub)", _operation(node) or "") or len(node.inputs) < 2:
        return False
    producers, seen, stack = set(), {node}, list(node.inputs)
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_producer(current.module):
            producers.add(current)
        else:
            stack.extend(current.inputs)
    return len(producers) >= 2


def _operation(node: Any) -> str | None:
    """Name of an operation that Torch-Pruning treats as element-wise, such as ``Relu``; else None."""
    if not isinstance(node.module, torch_pruning.ops._ElementWiseOp):
        return None
    return re.sub(r"(.*::)|(Backward\d*$)", "", str(node.module._grad_fn))


def _number_atoms(
    closures: Closures, names: Mapping[Any, str], dense: Tensor
) -> tuple[Tensor, tuple[Group, ...]]:
    """int64[classes], the atom of each class (-1: none), by first producer in module order, then channel."""
    order = {module: i for i, module in enumerate(names)}
    never = torch.iinfo(torch.int64).max
    first = torch.full((closures.classes,), never)
    for index, (node, function) in enumerate(closures.states):
        module = node.module
        if is_producer(module) and module in names and is_output(function):
            chosen = closures.of(index)
            key = order[module] * STRIDE + closures.position[chosen]
            first.scatter_reduce_(0, closures.label[chosen], key, "amin")
    first[dense] = never
    sorted_first, sorted_class = torch.sort(first)
    atoms = int((sorted_first < never).sum())
    atom_of_class = torch.full((closures.classes,), -1)
    atom_of_class[sorted_class[:atoms]] = torch.arange(atoms)
    producers, sizes = torch.unique_consecutive(sorted_first[:atoms] // STRIDE, return_counts=True)
    starts = (torch.cumsum(sizes, 0) - sizes).tolist()
    name_of = list(names.values())
    groups = [
        Group(name_of[p], s, n) for p, s, n in zip(producers.tolist(), starts, sizes.tolist(), strict=True)
    ]
    return atom_of_class, tuple(groups)


def _refuse_unknown(
    closures: Closures, atom_of_class: Tensor, names: Mapping[Any, str], parameters: Mapping[Any, str]
) -> None:
    """Refuse what sampled channels reach and what cannot be narrowed with them."""
    operations = []
    for index, (node, function) in enumerate(closures.states):
        chosen = closures.of(index)
        if not bool((atom_of_class[closures.label[chosen]] >= 0).any()):
            continue
        if node.module in parameters:
            raise ValueError(
                f"channels meet {parameters[node.module]}, a parameter outside the known layers; {_ADVICE}"
            )
        if node.module in names:
            _refuse_module(node.module, names[node.module])
            _refuse_positions(
                node.module, names[node.module], int(closures.position[chosen].max()), is_output(function)
            )
        operations.append(node)
    for node in operations:  # after the modules, whose own operations are named less clearly
        name = _operation(node)
        if name is not None and not _CHANNEL_PRESERVING.fullmatch(name):
            raise ValueError(
                f"channels pass through the operation {name} near {_neighbour(node, names)}, "
                f"which may reorder or mix them; {_ADVICE}"
            )


def _refuse_other_additions(closures: Closures, ids: Tensor, names: Mapping[Any, str]) -> None:
    """Refuse sums of sampled channels that were not exposed: their operands would have to share a mask."""
    for index, (node, _) in enumerate(closures.states):
        if _joins_producers(node) and bool((ids[closures.label[closures.of(index)]] >= 0).any()):
            raise ValueError(
                f"the addition near {_neighbour(node, names)} is in a forward that torch.fx cannot trace, "
                "that depends on the training mode or that runs twice, or it adds tensors of two shapes; "
                "use residual=coupled or residual=internal"
            )


def _neighbour(node: Any, names: Mapping[Any, str]) -> str:
    """The nearest module before an operation or, if there is none, after it; for messages."""
    for direction in ("inputs", "outputs"):
        queue = [node]
        for current in queue:
            if current.module in names:
                return f"{names[current.module]} ({type(current.module).__name__})"
            queue.extend(n for n in getattr(current, direction) if n not in queue)
    return "the input of the network"


def _refuse_module(module: nn.Module, name: str) -> None:
    title = f"{name} ({type(module).__name__})"
    if not (isinstance(module, (*_LAYERS, nn.PReLU)) or is_norm(module)):
        raise ValueError(f"{title} works on sampled channels and cannot be narrowed with them; {_ADVICE}")
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        raise ValueError(f"{title} works on sampled channels and cannot be narrowed with them; {_ADVICE}")
    own = {key for key, value in module.named_parameters() if value is not None}
    if not own <= {"weight", "bias"} or ("weight" not in own and isinstance(module, _LAYERS)):
        raise ValueError(
            f"{title} holds the parameters {sorted(own)}, not a plain weight and bias; {_ADVICE}"
        )


def _refuse_positions(module: nn.Module, name: str, last: int, output: bool) -> None:
    width = _width(module, output)
    if last >= width:
        raise ValueError(
            f"{name} ({type(module).__name__}) has {width} channels, but channel {last} seems to reach it: "
            f"an operation before "
            f"it reorders, mixes or broadcasts channels; {_ADVICE}"
        )


def _width(module: nn.Module, output: bool) -> int:
    if isinstance(module, _ConvNd):
        return module.out_channels if output else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if output else module.in_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else STRIDE
    assert is_norm(module)
    return module.num_features if isinstance(module, _BatchNorm) else module.get_buffer("weight").numel()


def _axes(
    model: nn.Module, closures: Closures, ids: Tensor, names: Mapping[Any, str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Axis, ...]]]:
    """Shapes and axes of all floating-point tensors; ``ids`` are the atoms or unions of the classes."""
    tensors = {
        name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()
    }
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    axes: dict[str, list[Axis]] = {name: [None] * len(shape) for name, shape in shapes.items()}
    for index, (node, function) in enumerate(closures.states):
        if node.module not in names:
            continue
        chosen = closures.of(index)
        atoms = ids[closures.label[chosen]]
        position = closures.position[chosen][atoms >= 0]
        for tensor, dim in (
            _sides(node.module, names[node.module], is_output(function)) if len(position) else ()
        ):
            if tensor in axes:
                _write_axis(axes[tensor], dim, shapes[tensor][dim], position, atoms[atoms >= 0])
    return shapes, _share_equal(axes)


def _share_equal(axes: Mapping[str, list[Axis]]) -> dict[str, tuple[Axis, ...]]:
    """The same axes, with one tensor for all that are equal: a norm's four vectors name the same atoms."""
    first: dict[bytes, Tensor] = {}
    return {
        name: tuple(
            None if axis is None else first.setdefault(axis.numpy().tobytes(), axis) for axis in of_tensor
        )
        for name, of_tensor in axes.items()
    }


def _sides(module: nn.Module, name: str, output: bool) -> list[tuple[str, int]]:
    """(tensor, dimension) pairs that hold the channels of one side of a module."""
    prefix = f"{name}." if name else ""
    if is_norm(module):
        return [(prefix + key, 0) for key in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, nn.PReLU):
        return [(prefix + "weight", 0)] if module.num_parameters > 1 else []
    transposed = isinstance(module, _ConvTransposeNd)
    if isinstance(module, _ConvNd) and is_depthwise(module):
        return [(prefix + "weight", 0), (prefix + "bias", 0)]
    if is_grouped(module):  # the rows of the weight belong to groups, its columns are those within a group
        own = [(prefix + "weight", 0)] if output != transposed else []
        return own + ([(prefix + "bias", 0)] if output else [])
    if output:
        return [(prefix + "weight", int(transposed)), (prefix + "bias", 0)]
    return [(prefix + "weight", 1 - int(transposed))]


def _write_axis(axes: list[Axis], dim: int, size: int, position: Tensor, atoms: Tensor) -> None:
    axis = axes[dim]
    if axis is None:
        axis = axes[dim] = torch.full((size,), -1, dtype=torch.int64)
    axis[position] = atoms


def _parameter_names(network: nn.Module) -> dict[Any, str]:
    return {parameter: name for name, parameter in network.named_parameters()}


def _refuse_shared_parameters(model: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            raise ValueError(
                f"{first[id(parameter)]} and {name} are one shared parameter; give each layer its own, "
                "or write a channel map by hand"
            )
        first[id(parameter)] = name
