"""Residual additions as modules, so that operands with different channels can be added.

    left   channels 0 2 5      +      right   channels 2 3      =      sum   channels 0 2 3 5
    left_index  0 1 3                 right_index  1 2                 width 4

Networks write ``out += shortcut`` inside the ``forward`` of a block. ``expose_additions`` traces that one
``forward`` (its sub-modules stay calls) and puts a ``StreamAdd`` in place of each addition. The block remains
the same object with the same parameters under the same names; only its ``forward`` is another.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from offload_sparse.channels.model_call import Inputs, random_states, restore_random_states
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.views import fit_views

_PREFIX = "stream_add_"


class StreamAdd(nn.Module):
    """The sum of two tensors that may each hold only some of its channels (dimension 1).

    Attributes:
        width: channels of the sum; 0 as long as both operands hold all of them: an ordinary addition.
        left_index: int64[channels of left], where each of them is in the sum; in ascending order.
        right_index: the same for the second operand."""

    left_index: Tensor
    right_index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        for name in ("left_index", "right_index"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64, device="cpu"), persistent=False)

    def hold(self, left: Tensor, right: Tensor, device: torch.device) -> None:
        """Say which channels of the sum each operand on ``device`` holds: bool[channels of the sum], on the
        CPU."""
        plain = bool(left.all()) and bool(right.all())
        self.width = 0 if plain else left.numel()
        self.left_index = left[: self.width].nonzero().flatten().to(device)
        self.right_index = right[: self.width].nonzero().flatten().to(device)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if not self.width:
            return left + right
        dtype = torch.promote_types(left.dtype, right.dtype)  # autocast may give two types
        left, right = left.to(dtype), right.to(dtype)
        if self.left_index.numel() == self.width:
            return left.index_add(1, self.right_index, right)
        if self.right_index.numel() == self.width:
            return right.index_add(1, self.left_index, left)
        out = left.new_zeros(left.shape[0], self.width, *left.shape[2:])
        return out.index_copy_(1, self.left_index, left).index_add_(1, self.right_index, right)

    def extra_repr(self) -> str:
        if not self.width:
            return ""
        return f"{self.left_index.numel()} + {self.right_index.numel()} -> {self.width} channels"


def expose_additions(
    model: nn.Module, names: Collection[str] | None = None, inputs: Inputs | None = None
) -> nn.Module:
    """Put a ``StreamAdd`` in place of every addition of two tensors. Done twice, it changes nothing more.
    Returns the model. Raises ValueError: one of ``names`` is not an addition of this model.

    Args:
        model: on any device; changed in place: blocks with additions get a class with a new ``forward``.
        names: qualified names of the additions wanted, from an earlier call on the same architecture; all
            that can be found if None. A ``forward`` that torch.fx cannot trace, that looks at ``training``
            or that draws random numbers is left alone.
        inputs: if given, a ``forward`` that is called with other values than the defaults of its arguments
            when the model is called with these is left alone, too."""
    wanted: dict[str, set[str]] = {}
    for owner, _, leaf in (name.rpartition(".") for name in names or ()):
        wanted.setdefault(owner, set()).add(leaf)
    other = _called_otherwise(model, inputs) if inputs is not None else set()
    for path, module in list(model.named_modules()):
        if path not in other and (names is None or path in wanted):
            _expose_in(module, wanted.get(path))
    found = {name for name, _ in additions(model)}
    missing = sorted(set(names or ()) - found)
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no addition {missing[0]!r} that torch.fx can trace; "
            "was the channel map made for another model?"
        )
    return model


def additions(model: nn.Module) -> Iterator[tuple[str, StreamAdd]]:
    """The exposed additions of a model, by qualified name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, StreamAdd))


def set_additions(model: nn.Module, selection: Selection, device: torch.device) -> None:
    """Make the additions and the written sizes of a narrow network those of ``selection``.

    The additions must have been exposed."""
    fit_views(model, selection.views)
    for name, (left, right) in selection.additions.items():
        add = model.get_submodule(name)
        assert isinstance(add, StreamAdd)
        add.hold(left, right, device)


def _is_own(module: nn.Module) -> bool:
    return not (type(module).__module__.startswith("torch.nn.") or isinstance(module, StreamAdd))


def _expose_in(module: nn.Module, wanted: Collection[str] | None) -> None:
    if not _is_own(module):
        return
    if any(isinstance(child, StreamAdd) for child in module.children()):
        return
    graph = _own_forward(module)
    if graph is None:
        return
    for number, node in enumerate(_sums(graph)):
        name = f"{_PREFIX}{number}"
        if wanted is None or name in wanted:
            module.add_module(name, StreamAdd())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(name, node.args))
            graph.erase_node(node)
    if any(isinstance(child, StreamAdd) for child in module.children()):
        forward = type(fx.GraphModule(module, graph)).forward
        kind = type(module)
        body = {"forward": forward, "__module__": kind.__module__, "__reduce_ex__": _reduce}
        if not hasattr(kind, "__deepcopy__"):
            body["__deepcopy__"] = _deepcopy
        module.__class__ = type(kind.__name__, (kind,), body)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a block with exposed additions is pickled: as the block that it was, whose reader exposes again."""
    del protocol
    return _unpickled, (type(module).__mro__[1],), module.__dict__, None, None, _set_state


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    adds = {name: child for name, child in module.named_children() if isinstance(child, StreamAdd)}
    for name in adds:
        del module._modules[name]
    _expose_in(module, adds)
    module._modules.update(adds)


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copies are not traced anew, which takes milliseconds a block."""
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return twin


def change(left: Any, right: Any, by: str = "iadd") -> Any:
    """``left += right`` (or another such operator), as a call: torch.fx writes operators otherwise."""
    return getattr(operator, by)(left, right)


class _Value(fx.Proxy):
    """Knows that ``y += x`` is not ``y = y + x`` where others read ``y``, too; so with other operators."""


def _operator(by: str) -> Callable[[fx.Proxy, Any], Any]:
    def changed(left: fx.Proxy, right: Any) -> Any:
        more = {} if by == "iadd" else {"by": by}
        return left.tracer.create_proxy("call_function", change, (left, right), more)

    return changed


_ARITHMETIC = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
for _by in (*_ARITHMETIC, "iand", "ior", "ixor", "ilshift", "irshift"):
    setattr(_Value, f"__{_by}__", _operator(_by))


class _OwnForward(fx.Tracer):
    """Traces one ``forward`` and nothing below it."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def _own_forward(module: nn.Module) -> fx.Graph | None:
    """The graph of a ``forward`` if it holds additions and is the same in training and evaluation."""
    training, states = module.training, random_states()
    try:
        graphs = []
        for module.training in (True, False):
            graphs.append(_OwnForward().trace(module, _defaults(module)))
    except Exception:  # any control flow on values ends up here, in whatever form the model's code fails
        return None
    finally:
        module.training = training
        drawn = random_states() != states
        restore_random_states(states)
    codes = [graph.python_code("self").src for graph in graphs]
    return graphs[0] if codes[0] == codes[1] and not drawn and _sums(graphs[0]) else None


def _defaults(module: nn.Module) -> dict[str, object]:
    """Arguments that have a default are traced with it: a proxy would never be None. Those with a container,
    which torch.fx would take apart, are not."""
    parameters = inspect.signature(type(module).forward).parameters
    plain = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {n: default for n, default in plain.items() if not isinstance(default, (tuple, list, dict))}


def _called_otherwise(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of modules that are given other values for arguments than those that ``_defaults`` traces."""
    found = set[str]()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        defaults = _defaults(module).items()
        pairs = [(given[n], default) for n, default in defaults if n in given]
        if any(type(value) is not type(default) or value != default for value, default in pairs):
            found.add(name)

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if _is_own(module) and _defaults(module)
    ]
    if handles:
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def _sums(graph: fx.Graph) -> list[fx.Node]:
    """Additions of two computed values, in order, of which nothing but the result is read."""
    known = {"call_function": (operator.add, torch.add, change), "call_method": ("add", "add_")}
    named = [n for n in graph.nodes if n.target in known.get(n.op, ()) and len(n.args) == 2 and not n.kwargs]
    sums = [n for n in named if all(isinstance(a, fx.Node) and a.op != "get_attr" for a in n.args)]
    return [n for n in sums if n.target not in (change, "add_") or _is_last_use(n)]


def _is_last_use(node: fx.Node) -> bool:
    """Whether nobody else reads the first argument, nor what it may be a view of."""
    before = node.args[0]
    assert isinstance(before, fx.Node)
    view = before.op == "call_method" or before.target in (operator.getitem, change)
    return set(before.users) == {node} and (not view or _is_last_use(before))
