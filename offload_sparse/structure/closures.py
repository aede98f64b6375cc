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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch_pruning._helpers import _HybridIndex

from offload_sparse.structure.stream_add import additions, expose_additions
from offload_sparse.structure.subnet import meta_copy

State = tuple[Any, Callable[..., Any]]
"""One side of one module or operation: a node of Torch-Pruning's graph and the function that prunes this
side."""

STRIDE = 1 << 32  # an entry is encoded as state * STRIDE + position
_INPUT_STUBS: Mapping[int, type[nn.Module]] = {4: nn.Conv2d, 5: nn.Conv3d}


class TimeLimitError(BaseException):
    """Not an ``Exception``: handlers in models and tracers must not swallow it."""


@dataclass(frozen=True, eq=False)
class Closures:
    """All entries that some output channel of a convolution or linear layer ties to something, and their
    classes.

    Attributes:
        states: (Torch-Pruning node, pruning function) pairs; a pair is one side of one module or operation.
        state: int64[entries], index into ``states``.
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

    def side(self, layer: nn.Module, output: bool) -> Tensor:
        """int64[channels], the classes of the channels of one side of a layer; -1 where nothing is tied."""
        width = layer.weight.shape[0 if output else 1]  # type: ignore[index]
        classes = torch.full((int(width),), -1)
        for index, (node, function) in enumerate(self.states):
            if node.module is layer and is_output(function) == output:
                chosen = self.state == index
                classes[self.position[chosen]] = self.label[chosen]
        return classes


class TracedNetwork(nn.Module):
    """The network behind a layer per input, so that channels of the inputs have a node of their own."""

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.network = network
        self.sums: dict[str, SeparatedAdd] = {}
        self.stubs = nn.ModuleList([_input_stub(x) for x in inputs])

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*[stub(x) for stub, x in zip(self.stubs, inputs, strict=True)])


def _input_stub(x: Tensor) -> nn.Module:
    if not x.is_floating_point():
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
        return self.out(
            self.left(left) * self.right(right)
        )  # an addition would count as one of the network's


def _separate_additions(network: nn.Module, inputs: list[Tensor]) -> dict[str, SeparatedAdd]:
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
    model: nn.Module, example_inputs: tuple[Tensor, ...], separate: bool = False
) -> tuple[TracedNetwork, Any]:
    """Torch-Pruning's graph of a copy on meta, or on the CPU for models that look at values.

    Args:
        separate: leave the operands of additions untied; the additions are then in ``TracedNetwork.sums``.
    """
    try:
        return _build_graph(meta_copy(model), [x.detach().to("meta") for x in example_inputs], separate)
    except TimeLimitError:
        raise
    except Exception as error:
        if any(t.is_meta for t in [*model.parameters(), *model.buffers(), *example_inputs]):
            raise _not_traceable(model, error) from error
    try:
        inputs = [x.detach().to("cpu") for x in example_inputs]
        return _build_graph(copy.deepcopy(model).to("cpu"), inputs, separate)
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


def _build_graph(network: nn.Module, inputs: list[Tensor], separate: bool) -> tuple[TracedNetwork, Any]:
    sums = _separate_additions(network, inputs) if separate else {}
    wrapper = TracedNetwork(network, inputs)
    wrapper.sums = sums
    for parameter in network.parameters():
        parameter.requires_grad_(
            parameter.is_floating_point()
        )  # the graph follows autograd, also through frozen layers
    with torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            wrapper,
            example_inputs=inputs,
            forward_fn=lambda module, args: module(
                *args
            ),  # without it, any exception of the model is swallowed once
            output_transform=_as_output_operations,
            verbose=False,
        )
    return wrapper, graph


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


def channel_closures(graph: Any, deadline: float = float("inf")) -> Closures:
    """Follow Torch-Pruning's dependencies from every output channel of every convolution and linear layer at
    once.

    Equal to the union of ``graph.get_pruning_group(layer, prune_out_channels, [i])`` over all layers and
    channels i, since index mappings act on each index by itself; each (dependency, index) is visited once
    instead of once per channel. Added are the ties within each group of a grouped convolution, which
    Torch-Pruning leaves to its pruners.
    """
    number: dict[State, int] = {}
    seen: list[set[int]] = []
    sources, targets = [], []
    pending = []

    def visit(state: State, positions: Sequence[int]) -> int:
        index = number.setdefault(state, len(number))
        if index == len(seen):
            seen.append(set())
        new = [p for p in dict.fromkeys(positions) if p not in seen[index]]
        seen[index].update(new)
        if new:
            pending.append((index, state, new))
        return index

    def tie(source: int, roots: Sequence[int], target: int, mapped: Sequence[int]) -> None:
        sources.append(source * STRIDE + torch.tensor(roots, dtype=torch.int64))
        targets.append(target * STRIDE + torch.tensor(mapped, dtype=torch.int64))

    for node in list(graph.module2node.values()):
        if is_producer(node.module):
            pruner = graph.get_pruner_of_module(node.module)
            visit((node, pruner.prune_out_channels), range(pruner.get_out_channels(node.module)))
    while pending:
        if time.monotonic() > deadline:
            raise TimeLimitError
        index, (node, function), positions = pending.pop()
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                roots, mapped = _map_positions(dependency, positions)
                tie(index, roots, visit((dependency.target, dependency.handler), mapped), mapped)
        if is_grouped(node.module):
            pruner = graph.get_pruner_of_module(node.module)
            for side in (pruner.prune_in_channels, pruner.prune_out_channels):
                roots, mapped = _group_members(node.module, function, side, positions)
                tie(index, roots, visit((node, side), mapped), mapped)
    every = torch.tensor(
        [i * STRIDE + p for i, positions in enumerate(seen) for p in positions], dtype=torch.int64
    )
    return _classes(tuple(number), every, sources, targets)


def _map_positions(dependency: Any, positions: list[int]) -> tuple[list[int], list[int]]:
    """Pairs (position at the source, position at the target), by the dependency's own index mappings."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return positions, positions
    indices = [_HybridIndex(idx=p, root_idx=p) for p in positions]
    for mapping in mappings:
        indices = mapping(indices)
    if any(i.idx < 0 or i.root_idx is None for i in indices):
        raise ValueError(f"channels cannot be followed into {dependency.target}; write a channel map by hand")
    return [i.root_idx for i in indices], [i.idx for i in indices]


def _group_members(
    module: _ConvNd, function: Callable[..., Any], side: Callable[..., Any], positions: list[int]
) -> tuple[list[int], list[int]]:
    """Pairs (position, member): all channels on ``side`` in the same group of a grouped convolution.

    Its weight has no entry between two groups, so a group is dropped whole: inputs, filters and outputs.
    """
    own = _group_size(module, function)
    size = _group_size(module, side)
    pairs = [(p, p // own * size + i) for p in positions for i in range(size)]
    return [p for p, _ in pairs], [member for _, member in pairs]


def _group_size(module: _ConvNd, function: Callable[..., Any]) -> int:
    width = module.out_channels if function.__name__ == "prune_out_channels" else module.in_channels
    return width // module.groups


def _classes(
    states: tuple[State, ...], every: Tensor, sources: list[Tensor], targets: list[Tensor]
) -> Closures:
    entries = torch.unique(every)
    nothing = torch.zeros(0, dtype=torch.int64)
    u = torch.searchsorted(entries, torch.cat([nothing, *sources]))
    v = torch.searchsorted(entries, torch.cat([nothing, *targets]))
    label = torch.unique(connected_components(len(entries), u, v), return_inverse=True)[1]
    return Closures(states, entries // STRIDE, entries % STRIDE, label)


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
