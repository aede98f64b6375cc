"""Memory of a forward and backward pass, counted without computing anything.

The pass runs on tensors without values: shapes and lifetimes are those of the real pass. Every
storage counts from the operation that makes it to the moment that nobody, autograd included, refers to it any
more; that is what an allocator sees.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import Subnet

Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
"""(module, (images, labels)) -> mean loss."""


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of storages that operations make, and the most that lived at once.

    Attributes:
        live: bytes that are alive now.
        peak: the largest ``live`` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Leave the storages of ``tensors`` out: they were there before."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        # What goes in and is not known was made elsewhere, such as constants of the network.
        self.ignore(*(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_peak(
    model: nn.Module,
    selection: Selection,
    image_shape: tuple[int, ...],
    loss_fn: Loss,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> tuple[int, int]:
    """Bytes that a subnet's passes take beside its weights, gradients, statistics and the batch: (peak of a
    forward and backward pass, peak of a forward pass without a graph).

    Args:
        model: the full model on the meta device, additions exposed.
        image_shape: [b, C, H, W] of this rank's part of a batch.
        dtype: type of weights and images.
        autocast: type that forward passes compute in, if not that of the weights."""
    # Meta tensors serve and are several times faster, but nothing can be autocast on them.
    device = torch.device("meta" if autocast is None else "cpu")
    fake: AbstractContextManager[Any] = nullcontext()
    if autocast is not None:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
    subnet = Subnet(model, device)
    with fake, device:
        weights = torch.empty(selection.layout(subnet.parameter_names).size, dtype=dtype)
        buffers = torch.empty(selection.layout(subnet.buffer_names).size, dtype=dtype)
        gradients = torch.empty_like(weights)
        images = torch.empty(image_shape, dtype=dtype)
        labels = torch.empty(image_shape[0], dtype=torch.int64)
    subnet.bind(selection, weights, gradients, buffers)
    subnet.module.train()
    peaks = []
    for trained in (True, False):
        counter = LiveBytes()
        counter.ignore(weights, gradients, buffers, images, labels)
        casting = torch.autocast("cpu", autocast, enabled=autocast is not None)
        with fake, counter, torch.set_grad_enabled(trained):
            with casting:
                loss = loss_fn(subnet.module, (images, labels))
            if trained:
                loss.backward()
        peaks.append(counter.peak)
    return peaks[0], peaks[1]
