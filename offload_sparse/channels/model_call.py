"""One forward pass: its inputs, its mode, and what it computes."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = tuple[Any, ...]
"""Positional arguments of a network: tensors, or tuples, lists and dicts that hold some and other values."""

_RATES = (
    "p",
    "attn_dropout",
    "attention_dropout",
    "drop_prob",
    "drop_rate",
    "dropout_rate",
    "dropout",
    "attn_drop_rate",
    "drop_path_rate",
)
_DROPOUTS = {
    getattr(place, name)
    for place in (torch, functional)
    for name in dir(place)
    if re.fullmatch(r"(feature_)?(alpha_)?dropout([123]d|_)?", name)
}


def move_inputs(inputs: Inputs, device: str | torch.device) -> Inputs:
    """The inputs with every tensor on ``device``, apart from any graph; zeros where values are unknown."""

    def moved(x: Tensor) -> Tensor:
        unknown = x.is_meta and str(device) != "meta"
        return torch.zeros_like(x, device=device) if unknown else x.detach().to(device)

    return pytree.tree_map_only(Tensor, moved, inputs)


def enlarge_inputs(inputs: Inputs, least: int) -> Inputs:
    """The inputs with at least ``least`` samples: those of a smaller batch are repeated, in order.

    The batch is dimension 0 of every tensor; where tensors differ in it, all stay as they are."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    batch = {x.shape[0] for x in tensors}
    if len(batch) != 1 or not 0 < min(batch) < least:
        return inputs
    rows = torch.arange(least) % min(batch)

    def enlarged(x: Tensor) -> Tensor:
        return x[rows.to(x.device)] if x.dim() else x

    return pytree.tree_map_only(Tensor, enlarged, inputs)


def random_states() -> bytes:
    """The states of the generators that everybody draws from: of torch on the CPU, Python, numpy."""
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


def restore_random_states(states: bytes) -> None:
    """Go back to what ``random_states`` gave."""
    of_torch, of_python, of_numpy = pickle.loads(states)
    torch.set_rng_state(torch.from_numpy(of_torch))
    random.setstate(of_python)
    np.random.set_state(of_numpy)


@contextmanager
def attention_in_products() -> Iterator[None]:
    """Attention is computed by products of matrices that can be followed, not by one fused operation."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class NoDropout(TorchFunctionMode):
    """Makes the functions of dropout give what they are given; see ``disable_dropout``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:
            kwargs = kwargs | {"dropout_p": 0.0}
        elif func is functional.scaled_dot_product_attention and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        return func(*args, **kwargs)


def disable_dropout(network: nn.Module) -> None:
    """Set the rates of dropout and stochastic depth to 0: they draw other numbers for other widths. Dropout
    that a forward calls as a function is left to ``NoDropout``."""
    for module in network.modules():
        for rate in _RATES:
            ours = rate != "p" or type(module).__name__ == "StochasticDepth"
            if ours and type(getattr(module, rate, None)) in (int, float):
                setattr(module, rate, 0.0)


class _Recorder(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        counts_batches = name == "add_" and not args[0].is_floating_point() and not args[0].dim()
        if "dropout" not in name and not counts_batches:
            self.names.append("batch_norm" if "batch_norm" in name else name)
        return func(*args, **(kwargs or {}))


def operations(network: nn.Module, inputs: Inputs, training: bool) -> list[str]:
    """Names of the operations of one forward pass, in order, dropout aside. The mode is set, and stays.

    How a batch norm computes is no difference between the modes; what its layer's own ``train`` keeps counts.
    """
    with _Recorder() as recorder, torch.enable_grad(), NoDropout():
        network.train(training)(*inputs)
    return recorder.names


def modes_differ(network: nn.Module, inputs: Inputs) -> bool:
    """Whether training computes something else than evaluation, such as an auxiliary head. ``network`` is a
    copy that nobody needs, on one device with ``inputs`` (two samples or more, as batch norms want them): its
    dropout is switched off, its running statistics move."""
    disable_dropout(network)
    return operations(network, inputs, False) != operations(network, inputs, True)
