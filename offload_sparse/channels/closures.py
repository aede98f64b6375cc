"""Which channels Torch-Pruning ties together: its dependency graph, followed from every single channel at
once.

    entry     (node, input or output side, position)
    tie       dropping entry a makes Torch-Pruning drop entry b
    closure   the entries that ties reach from one output channel of a convolution or linear layer
    class     the union of overlapping closures (a connected component of the ties)

Torch-Pruning's groups over all channels of a layer lose many-to-one ties (gated linear units, flatten),
while its closure of one channel is right. Its index mappings act on each index by itself, so all closures
can share one walk.
"""

from __future__ import annotations

import contextlib
import copy
import io
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch_pruning._helpers import _HybridIndex

from offload_sparse.channels.model_call import (
    Inputs,
    disable_dropout,
    enlarge_inputs,
    modes_differ,
    move_inputs,
)
from offload_sparse.channels.stream_add import additions, expose_additions
from offload_sparse.channels.subnet import is_norm, meta_copy

State = tuple[Any, Callable[..., Any]]
"""One side of one module or operation: a node of Torch-Pruning's graph and the function that prunes this
side."""

Positions = NDArray[np.int64]

STRIDE = 1 << 32  # beyond every position: a pair (number, position) is encoded as number * STRIDE + position
_INPUT_STUBS: Mapping[int, type[nn.Module]] = {4: nn.Conv2d, 5: nn.Conv3d}


class TimeLimitError(BaseException):
    """Not an ``Exception``: handlers in models and tracers must not swallow it."""


@dataclass(frozen=True, eq=False)
class Closures:
    """All entries that some output channel of a convolution or linear layer ties to something, and their
    classes.

    Attributes:
        states: (Torch-Pruning node, pruning function) pairs; a pair is one side of one module or operation.
        state: int64[entries], index into ``states``, ascending.
        position: int64[entries], position on that side.
        label: int64[entries], class of the entry, 0 … classes - 1.
    """

    states: tuple[State, ...]
    state: Tensor
    position: Tensor
    label: Tensor

    @property
    def classes(self) -> int:
        return int(self.label.max()) + 1 if self.label.numel() else 0

    def of(self, index: int) -> slice:
        """Where the entries of state number ``index`` stand."""
        return slice(self._starts[index], self._starts[index + 1])

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = torch.searchsorted(self.state, torch.arange(len(self.states) + 1)).tolist()
        return starts

    def side(self, layer: nn.Module, output: bool) -> Tensor:
        """int64[channels], the classes of the channels of one side of a layer; -1 where nothing is tied."""
        width = layer.weight.shape[0 if output else 1]  # type: ignore[index]
        classes = torch.full((int(width),), -1)
        for index, (node, function) in enumerate(self.states):
            if node.module is layer and is_output(function) == output:
                chosen = self.of(index)
                classes[self.position[chosen]] = self.label[chosen]
        return classes


class TracedNetwork(nn.Module):
    """The network behind a layer per input, so that channels of the inputs have a node of their own."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        self.sums: dict[str, SeparatedAdd] = {}
        self.stubs = nn.ModuleList([_input_stub(x) for x in pytree.tree_leaves(inputs)])

    def forward(self, *inputs: Any) -> Any:
        leaves, structure = pytree.tree_flatten(inputs)
        behind = [stub(x) for stub, x in zip(self.stubs, leaves, strict=True)]
        return self.network(*pytree.tree_unflatten(behind, structure))


def _input_stub(x: Any) -> nn.Module:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return nn.Identity()
    if x.ndim == 2:
        return nn.Linear(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
    if x.ndim in _INPUT_STUBS:
        return _INPUT_STUBS[x.ndim](x.shape[1], x.shape[1], 1, device=x.device, dtype=x.dtype)
    return nn.Identity()


class SeparatedAdd(nn.Module):
    """Stands for an addition where its operands and its result must not be tied: a layer on each side."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.left, self.right, self.out = (_input_stub(x) for _ in range(3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        # A product, since an addition would count as one of the network's.
        return self.out(self.left(left) * self.right(right))


def _separate_additions(network: nn.Module, inputs: Inputs) -> dict[str, SeparatedAdd]:
    """Put a ``SeparatedAdd`` in place of each addition of two tensors of one shape that is used once.

    Returns:
        them by name, in the order in which the network computes them.
    """
    operands: dict[str, list[tuple[Any, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, arguments: operands.setdefault(name, []).append(arguments)

    expose_additions(network)
    hooks = [add.register_forward_pre_hook(note(name)) for name, add in additions(network)]
    with torch.no_grad():
        network.eval()(*inputs)
    for handle in hooks:
        handle.remove()
    once = {name: calls[0] for name, calls in operands.items() if len(calls) == 1}
    sums = {name: SeparatedAdd(left) for name, (left, right) in once.items() if _same_form(left, right)}
    for name, add in sums.items():
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner).register_module(leaf, add)
    return sums


def _same_form(left: Any, right: Any) -> bool:
    """Whether both are tensors of one shape whose channels are dimension 1."""
    tensors = isinstance(left, Tensor) and isinstance(right, Tensor)
    return tensors and left.shape == right.shape and not isinstance(_input_stub(left), nn.Identity)


def trace(
    model: nn.Module, example_inputs: Inputs, separate: bool = False
) -> tuple[TracedNetwork, list[Any]]:
    """Torch-Pruning's graph of a copy on meta, or on the CPU for models that look at values.

    There is a second graph, of training mode, if that computes something else.

    Args:
        separate: leave the operands of additions untied; the additions are then in ``TracedNetwork.sums``.
    """
    try:
        return _build_graphs(meta_copy(model, other=True), move_inputs(example_inputs, "meta"), separate)
    except TimeLimitError:
        raise
    except Exception as error:
        tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(example_inputs)]
        if any(isinstance(t, Tensor) and t.is_meta for t in tensors):
            raise _not_traceable(model, error) from error
    try:
        return _build_graphs(copy.deepcopy(model).to("cpu"), move_inputs(example_inputs, "cpu"), separate)
    except TimeLimitError:
        raise
    except Exception as error:
        raise _not_traceable(model, error) from error


def _not_traceable(model: nn.Module, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValueError(
        f"{type(model).__name__} cannot be traced ({reason}); give example inputs that it accepts, "
        "or write a channel map by hand"
    )


def _build_graphs(network: nn.Module, inputs: Inputs, separate: bool) -> tuple[TracedNetwork, list[Any]]:
    inputs = enlarge_inputs(inputs, 2)  # in training mode, a batch norm wants two values
    modes = (False, True) if _trains_differently(network, inputs) else (False,)
    sums = _separate_additions(network, inputs) if separate else {}
    wrapper = TracedNetwork(network, inputs)
    wrapper.sums = sums
    for parameter in network.parameters():
        # The graph follows autograd, also through frozen layers.
        parameter.requires_grad_(parameter.is_floating_point())
    return wrapper, [_build_graph(wrapper, inputs, training) for training in modes]


def _trains_differently(network: nn.Module, inputs: Inputs) -> bool:
    try:
        return modes_differ(copy.deepcopy(network), inputs)
    except Exception:  # a network that cannot be called like this in training mode fails in the self-test
        return False


def _build_graph(wrapper: TracedNetwork, inputs: Inputs, training: bool) -> Any:
    disable_dropout(wrapper)
    with torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            wrapper,
            example_inputs=inputs,
            # Without it, any exception of the model is swallowed once.
            forward_fn=lambda module, args: module.train(training)(*args),
            output_transform=_as_output_operations,
            customized_pruners={type(m): _FrozenNormPruner() for m in wrapper.modules() if _is_frozen(m)},
            verbose=False,
        )


class _FrozenNormPruner(torch_pruning.BasePruningFunc):
    """Tells Torch-Pruning that a norm of buffers works channel by channel; it never prunes one."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        del idxs
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        return int(layer.get_buffer("running_mean").numel())

    get_in_channels = get_out_channels


def _is_frozen(module: nn.Module) -> bool:
    return is_norm(module) and not isinstance(module, _BatchNorm)


def _as_output_operations(output: Any) -> list[Tensor]:
    """Every output tensor behind one more operation, so that each has a node of its own."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    return [t * 1 for t in tensors]


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise ``TimeLimitError`` in the body after ``seconds``; outside the main thread only at its end."""
    start = time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield
        if time.monotonic() - start > seconds:
            raise TimeLimitError
        return

    def expire(*_: Any) -> None:
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, expire)
    remaining, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # may expire at once, so within the try
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:  # a timer of the caller goes on where it would be by now
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - start), 1e-6), interval)


def channel_closures(*graphs: Any, deadline: float = float("inf")) -> Closures:
    """Follow Torch-Pruning's dependencies from every output channel of every convolution and linear layer at
    once.

    Equal to the union of ``graph.get_pruning_group(layer, prune_out_channels, [i])`` over all layers and
    channels i, since index mappings act on each index by itself; each (dependency, index) is visited once
    instead of once per channel. Added are the ties within each group of a grouped convolution, which
    Torch-Pruning leaves to its pruners, and those of one layer in several graphs of the same network.
    """
    walk = _Walk()
    pruner_of = graphs[0].get_pruner_of_module
    for graph in graphs:
        for node in list(graph.module2node.values()):
            if is_producer(node.module):
                pruner = graph.get_pruner_of_module(node.module)
                width = pruner.get_out_channels(node.module)
                walk.visit((node, pruner.prune_out_channels), np.arange(width, dtype=np.int64))
    while walk.pending:
        if time.monotonic() > deadline:
            raise TimeLimitError
        index, (node, function), positions = walk.pending.pop()
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                roots, mapped = _map_positions(dependency, positions)
                walk.tie(index, roots, (dependency.target, dependency.handler), mapped)
        for graph in graphs if len(graphs) > 1 else ():
            twin = graph.module2node.get(node.module)
            if twin is not None and twin is not node:
                pruner = graph.get_pruner_of_module(node.module)
                walk.tie(index, positions, (twin, getattr(pruner, function.__name__)), positions)
        if is_grouped(node.module):
            pruner = pruner_of(node.module)
            for side in (pruner.prune_in_channels, pruner.prune_out_channels):
                roots, mapped = _group_members(node.module, function, side, positions)
                walk.tie(index, roots, (node, side), mapped)
    return walk.closures()


class _Walk:
    """Entries that have been reached, as one table of flags per state, and the ties between them.

    Attributes:
        pending: (number of a state, the state, positions that were reached and not followed yet).
    """

    def __init__(self) -> None:
        self.pending: list[tuple[int, State, Positions]] = []
        self._number: dict[State, int] = {}
        self._seen: list[NDArray[np.bool_]] = []
        self._ties: list[tuple[int, Positions, int, Positions]] = []

    def visit(self, state: State, positions: Positions) -> int:
        """Note that entries of ``state`` are reached; the number of the state."""
        index = self._number.setdefault(state, len(self._number))
        if index == len(self._seen):
            self._seen.append(np.zeros(0, np.bool_))
        missing = int(positions.max(initial=-1)) + 1 - len(self._seen[index])
        if missing > 0:
            self._seen[index] = np.pad(self._seen[index], (0, missing))
        before = self._seen[index].copy()
        self._seen[index][positions] = True
        new = np.flatnonzero(self._seen[index] != before)
        if len(new):
            self.pending.append((index, state, new))
        return index

    def tie(self, source: int, roots: Positions, state: State, mapped: Positions) -> None:
        """Entry ``roots[i]`` of state number ``source`` is tied to entry ``mapped[i]`` of ``state``."""
        self._ties.append((source, roots, self.visit(state, mapped), mapped))

    def closures(self) -> Closures:
        """The classes of all entries that were reached."""
        reached = [np.flatnonzero(seen) for seen in self._seen]
        starts = np.cumsum([0, *(len(positions) for positions in reached)])
        # The number of an entry among all: those of earlier states, then the reached positions before it.
        place = [start + np.cumsum(seen) - 1 for start, seen in zip(starts, self._seen, strict=False)]
        nothing = np.zeros(0, np.int64)
        u = np.concatenate([nothing, *(place[s][roots] for s, roots, _, _ in self._ties)])
        v = np.concatenate([nothing, *(place[t][mapped] for _, _, t, mapped in self._ties)])
        root = connected_components(int(starts[-1]), torch.from_numpy(u), torch.from_numpy(v))
        return Closures(
            tuple(self._number),
            torch.from_numpy(np.repeat(np.arange(len(reached)), [len(p) for p in reached])),
            torch.from_numpy(np.concatenate([nothing, *reached])),
            torch.unique(root, return_inverse=True)[1],
        )


def _map_positions(dependency: Any, positions: Positions) -> tuple[Positions, Positions]:
    """Pairs (position at the source, position at the target), by the dependency's own index mappings."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return positions, positions
    indices = [_HybridIndex(idx=p, root_idx=p) for p in positions.tolist()]
    for mapping in mappings:
        indices = mapping(indices)
    if any(i.idx < 0 or i.root_idx is None for i in indices):
        raise ValueError(f"channels cannot be followed into {dependency.target}; write a channel map by hand")
    roots, mapped = ([i.root_idx for i in indices], [i.idx for i in indices])
    return np.array(roots, np.int64), np.array(mapped, np.int64)


def _group_members(
    module: _ConvNd, function: Callable[..., Any], side: Callable[..., Any], positions: Positions
) -> tuple[Positions, Positions]:
    """Pairs (position, member): all channels on ``side`` in the same group of a grouped convolution.

    Its weight has no entry between two groups, so a group is dropped whole: inputs, filters and outputs.
    """
    own = _group_size(module, function)
    size = _group_size(module, side)
    members = (positions // own * size)[:, None] + np.arange(size)
    return np.repeat(positions, size), members.ravel()


def _group_size(module: _ConvNd, function: Callable[..., Any]) -> int:
    width = module.out_channels if function.__name__ == "prune_out_channels" else module.in_channels
    return width // module.groups


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


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def is_grouped(module: Any) -> bool:
    """Whether a convolution has several groups of channels, and is not depthwise."""
    return isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)


def is_producer(module: Any) -> bool:
    """Whether a module has channels of its own: convolutions (depthwise ones have none) and linear layers."""
    return isinstance(module, (_ConvNd, nn.Linear)) and not is_depthwise(module)


def is_output(function: Callable[..., Any]) -> bool:
    """Whether a pruning function of Torch-Pruning prunes the output side of its module."""
    return function.__name__ == "prune_out_channels"
