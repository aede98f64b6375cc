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
from offload_sparse.config.run import TrainConfig
from offload_sparse.engine.gradients import FlatGradients
from offload_sparse.engine.losses import TAIL

Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
"""(module, (images, labels)) -> mean loss."""


def labels_shape(images: Tensor) -> torch.Size:
    """One label for each image, or for each token."""
    return images.shape[:1] if images.is_floating_point() else images.shape


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of storages that operations make: those that are alive (``live``), and the
    most that lived at once (``peak``)."""

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
    images: Tensor,
    loss_fn: Loss,
    train: TrainConfig,
    trained: bool = True,
    kept_gradients: bool = False,
) -> int:
    """The most bytes that live at once in a subnet's pass, beside its weights, flat gradients, statistics and
    the batch; of the types that ``train`` computes with.

    Args:
        model: the full model on the meta device, additions exposed.
        images: [b, C, H, W], or int64[b, L] tokens, of this rank's part of a batch; its values do not matter.
        trained: whether a backward pass follows; a forward pass alone has no graph.
        kept_gradients: the pass adds to gradients that were there before, as an ordinary network's."""
    dtype = getattr(torch, train.dtype)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.autocast)
    # Meta tensors serve and are several times faster, but nothing can be autocast on them, and attention has
    # no fused kernel there.
    tokens = not images.is_floating_point()
    device = torch.device("cpu" if tokens or autocast is not None else "meta")
    fake: AbstractContextManager[Any] = nullcontext()
    if device.type == "cpu":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
    subnet = Subnet(model, device)
    with fake, device:
        weights = torch.empty(selection.layout(subnet.parameter_names).size, dtype=dtype)
        buffers = torch.empty(selection.layout(subnet.buffer_names).size, dtype=dtype)
        buffer = torch.empty(weights.numel() + TAIL, dtype=dtype)
        given = torch.empty(images.shape, dtype=images.dtype if tokens else dtype)
        labels = torch.empty(labels_shape(images), dtype=torch.int64)
    subnet.bind(selection, weights, buffers)
    subnet.module.train()
    counter = LiveBytes()
    counter.ignore(weights, buffer, buffers, given, labels)
    parameters = list(subnet.module.parameters())
    gradients = FlatGradients(parameters, buffer)
    gradients.begin(1)
    for parameter in parameters if kept_gradients else ():
        parameter.grad = torch.empty_like(parameter)
        counter.ignore(parameter.grad)
    casting = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with fake, counter, torch.set_grad_enabled(trained):
        with casting:
            loss = loss_fn(subnet.module, (given, labels))
        if trained:
            loss.backward()
            if not kept_gradients:
                gradients.end([])
    return counter.peak
