"""One forward pass: its inputs, its mode, and what it computes."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
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


def output_tensors(output: Any) -> list[Tensor]:
    """Every tensor of what a network gives, in order, whatever holds it; data classes too, which are leaves
    to torch."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += output_tensors([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


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
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's own generators begin with ``seed``, those of CUDA devices too; outside they are as they
    were. Where CUDA is not in use it stays so, and its generators what their first use makes them."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices):
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield


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
    """A network runs inside without dropout, which draws other numbers for other widths: functions of dropout
    give what they are given, and rates, those of stochastic depth among them, are set to 0, for good."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for module in network.modules():
            for name, value in [*vars(module).items()]:
                rate = "drop" in name or (name == "p" and type(module).__name__ == "StochasticDepth")
                if rate and isinstance(value, float):
                    setattr(module, name, 0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:
            kwargs = kwargs | {"dropout_p": 0.0}
        elif func is functional.scaled_dot_product_attention and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        return func(*args, **kwargs)


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


def modes_differ(network: nn.Module, inputs: Inputs) -> bool:
    """Whether training computes something else than evaluation, such as an auxiliary head: other operations,
    dropout and the way in which a batch norm computes aside; what its layer's own ``train`` keeps counts.

    ``network`` is a copy that nobody needs, on one device with ``inputs`` (two samples or more, as batch
    norms want them): its dropout is switched off, its running statistics move."""
    found = []
    for training in (False, True):
        with _Recorder() as recorder, torch.enable_grad(), NoDropout(network):
            network.train(training)(*inputs)
        found.append(recorder.names)
    return found[0] != found[1]
