"""Peak of the memory that the computing device of a run would hold, also where that device is the CPU.

With CUDA its allocator knows. On a CPU device and host are the same memory, and the device's part is what
compute touches: the storages that forward and backward passes read or write, counted for as long as they
live, without those that live on the host in a run on a GPU. Workspace inside kernels is not seen. Where a
library copies to the host within a backward pass, the host's side of the copy is left out if the optimizer
touches it too, so the figure is an upper bound for libraries that offload.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TouchedStorages(TorchDispatchMode):
    """Inside, the bytes of every storage that an operation reads or writes are known at all times:
    ``history`` has one mapping per operation, from a token that is never used again to bytes gained or lost
    (storages can be resized), ``addresses`` those of all storages touched so far."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[int, int]] = []
        self.addresses: set[int] = set()
        self._alive: dict[int, _Storage] = {}
        self._tokens = itertools.count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.note(value for value in tree_iter((args, kwargs, result)) if isinstance(value, Tensor))
        return result

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Take ``tensors`` as touched, and look at the sizes of all known storages."""
        for tensor in tensors:
            for storage in _storages(tensor):
                key = storage._cdata
                self.addresses.add(key)
                if key not in self._alive:
                    self._alive[key] = _Storage(next(self._tokens), StorageWeakRef(storage))
        self.history.append(self._changes())

    def tokens(self, keys: Iterable[int]) -> set[int]:
        """Tokens of the storages at these addresses."""
        return {self._alive[key].token for key in keys if key in self._alive}

    def peak(self, hidden: Collection[int] = ()) -> int:
        """Largest sum of bytes at one time, without the storages of the tokens ``hidden``."""
        sizes = accumulate(
            sum(delta for token, delta in changes.items() if token not in hidden) for changes in self.history
        )
        return max(sizes, default=0)

    def _changes(self) -> dict[int, int]:
        changes: dict[int, int] = {}
        for key, known in list(self._alive.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(known.reference.cdata)
            size = 0 if storage is None else storage.nbytes()
            if size != known.size:
                changes[known.token] = size - known.size
                known.size = size
            if storage is None:
                del self._alive[key]
        return changes


@dataclass
class _Storage:
    """A known storage; the weak reference keeps its address from being used again."""

    token: int
    reference: StorageWeakRef
    size: int = 0


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.device.type != "meta" and local.layout == torch.strided:
        yield local.untyped_storage()


def touched_peak(
    compute: Callable[[], object],
    update: Callable[[], object] | None = None,
    resident: Sequence[Tensor] = (),
    on_host: Sequence[Tensor] = (),
) -> int:
    """Bytes of the device's part of one step, on a CPU.

    Args:
        compute: the forward and backward pass, and whatever else the device does.
        update: the optimizer step if the host does it, None if it is part of ``compute``.
        resident: tensors that stay on the device although ``update`` touches them.
        on_host: tensors that do not count although ``update`` leaves them alone."""
    with TouchedStorages() as device:
        device.note(resident)
        compute()
    device.note(())  # from here on it holds on to what is alive, so that no address is used again
    hidden = device.tokens(storage._cdata for t in on_host for storage in _storages(t))
    if update is not None:
        with TouchedStorages() as host:
            update()
        staying = {storage._cdata for t in resident for storage in _storages(t)}
        hidden |= device.tokens(host.addresses - staying)
    return device.peak(hidden)
