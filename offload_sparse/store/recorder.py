"""The recorder: which operations create and write the tensors of a model that is built on the meta device.

Two modes watch a construction. ``Recorder`` sits in the dispatcher and notes each operation that creates or
writes a tensor without values; ``PythonCalls`` sees what never gets there. Tensors are told apart by their
storage, so views, ``.data``, ``detach`` and Parameters are the same tensor. Only operations that mean the
same on the CPU are noted; the values behind any other are marked as unknown, with a reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]

_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that make a tensor from Python values, which the meta device would lose."""

_UNDEFINED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_FROM_TENSORS = {"copy_", "fill_", "_to_copy", "clone", "cat", "stack"}
_OVERWRITING = {"copy_", "fill_", "zero_", "eye"}
_RESIZING = {"resize_", "resize_as_", "set_"}
_UNSEEN = "it was made where the recorder does not look"


@dataclass(frozen=True)
class View:
    """Where a tensor lies in its storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    elements: int  # of the whole storage


@dataclass(eq=False)
class Operation:
    """One recorded call; its tensors are ``View``s, constants are real tensors.

    Attributes:
        target: the tensor that is created or written.
        creates: the call returns the target (else it writes it in place).
        overwrites: afterwards the target's storage holds nothing of what it held before.
        reads: storages whose values the call needs, besides the target's own.
        random: the call draws from the generator.
    """

    call: Callable[..., Any]
    args: _Args
    kwargs: _Kwargs
    target: View
    creates: bool
    overwrites: bool
    reads: tuple[int, ...] = ()
    random: bool = False


class Recorder(TorchDispatchMode):
    """Notes every operation that creates or writes a tensor on the meta device.

    Attributes:
        operations: what was understood, in program order.
        undefined: storages that hold something not understood, and why.
        reason: why the recording as a whole is not replayable; empty while it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.undefined: dict[int, str] = {}
        self.reason = ""
        # Holding the storages keeps their addresses from being used again; on the meta device they are empty.
        self._storages: dict[int, tuple[torch.UntypedStorage, int, torch.dtype]] = {}

    def reject(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Args = (), kwargs: _Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _meta_tensors((args, kwargs))
        for tensor in inputs:
            if not self.knows(tensor):
                self.undefined[self._register(tensor)] = _UNSEEN
        result = func(*args, **kwargs)
        written = _meta_tensors(_written(func, args, kwargs))
        fresh = [tensor for tensor in _meta_tensors(result) if not self.knows(tensor)]
        for tensor in fresh:
            self._register(tensor)
        if (written or fresh) and torch.Tag.inplace_view not in func.tags:
            self._note(func, args, kwargs, written, fresh)
        return result

    def knows(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def trouble(self, tensor: Tensor) -> str:
        """Why the values of a meta tensor are not known; empty when they are."""
        if not self.knows(tensor):
            return _UNSEEN
        if not self._usual(tensor):
            return "its storage was resized or recast"
        return self.undefined.get(tensor.untyped_storage()._cdata, "")

    def define(self, tensor: Tensor, value: Tensor) -> None:
        """``tensor`` was made from Python values; on the CPU it would be ``value``."""
        self._register(tensor)
        self._append(Operation(value.clone, (), {}, view_of(tensor), creates=True, overwrites=True))

    @contextmanager
    def opaque_initialisers(self) -> Iterator[None]:
        """While active, ``nn.init.trunc_normal_`` is noted as one operation.

        It rejects samples until all lie between the bounds, so the number of draws depends on their values,
        and on the meta device it does nothing at all. The function that does the work is replaced for the
        time of the recording.
        """
        original = nn.init._no_grad_trunc_normal_
        nn.init._no_grad_trunc_normal_ = self._opaque(original)
        try:
            yield
        finally:
            nn.init._no_grad_trunc_normal_ = original

    def _opaque(self, original: Callable[..., Any]) -> Callable[..., Tensor]:
        def noted(tensor: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            if not on_meta(tensor):
                return original(tensor, *args, generator=generator, **kwargs)
            if generator is not None or self.trouble(tensor) == _UNSEEN:
                self.reject("trunc_normal_ draws from a generator of its own or into an unknown tensor")
                return tensor
            view, whole = view_of(tensor), self._whole(tensor)
            self._append(Operation(original, (view, *args), kwargs, view, False, whole, random=True))
            return tensor

        return noted

    def _register(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (storage, storage.nbytes(), tensor.dtype)
        return storage._cdata

    def _usual(self, tensor: Tensor) -> bool:
        """Whether the storage has the size and the dtype that it was registered with."""
        storage, size, dtype = self._storages[tensor.untyped_storage()._cdata]
        return storage.nbytes() == size and tensor.dtype == dtype

    def _whole(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` covers each element of its storage once (in any order of dimensions)."""
        outer_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.permute(outer_first).is_contiguous()
        return dense and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()

    def _note(
        self, func: Any, args: _Args, kwargs: _Kwargs, written: list[Tensor], fresh: list[Tensor]
    ) -> None:
        if func.overloadpacket.__name__ in _UNDEFINED:
            return
        operation = self._understood(func, args, kwargs, written, fresh)
        if operation is not None:
            self._append(operation)
            return
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.reject(f"{func} draws random numbers in a way that is not replayed")
        for tensor in (*written, *fresh):
            self.undefined[tensor.untyped_storage()._cdata] = f"{func} is not replayed"

    def _append(self, operation: Operation) -> None:
        needed = operation.reads if operation.overwrites else (*operation.reads, operation.target.storage)
        unknown = [self.undefined[storage] for storage in needed if storage in self.undefined]
        if unknown:
            self.undefined[operation.target.storage] = unknown[0]
        else:
            self.undefined.pop(operation.target.storage, None)
        if operation.random or not unknown:
            self.operations.append(operation)

    def _understood(
        self, func: Any, args: _Args, kwargs: _Kwargs, written: list[Tensor], fresh: list[Tensor]
    ) -> Operation | None:
        """The operation, or None for what is not replayed."""
        name = func.overloadpacket.__name__
        if len(written) + len(fresh) != 1 or name in _RESIZING:
            return None
        target = (written or fresh)[0]
        if not all(self._usual(tensor) for tensor in (target, *_meta_tensors((args, kwargs)))):
            return None
        others = [] if name in _LIKE else [t for t in _meta_tensors((args, kwargs)) if t is not target]
        call = func
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random:
            call = _with_generator(func)
            if call is None or kwargs.get("generator") is not None or others:
                return None
        elif others and name not in _FROM_TENSORS and torch.Tag.pointwise not in func.tags:
            return None
        overwrites = bool(fresh) or ((is_random or name in _OVERWRITING) and self._whole(target))
        return Operation(
            call,
            tree_map_only(Tensor, _like if name in _LIKE else _literal, args),
            {key: tree_map_only(Tensor, _literal, value) for key, value in kwargs.items()}
            | ({"device": torch.device("cpu")} if "device" in kwargs or name in _LIKE else {}),
            view_of(target),
            creates=bool(fresh),
            overwrites=overwrites,
            reads=tuple(t.untyped_storage()._cdata for t in others),
            random=is_random,
        )


class PythonCalls(TorchFunctionMode):
    """Sees what the dispatcher does not: tensors made from Python values, and questions about the device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: _Args = (), kwargs: _Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.is_meta:
            # Who asks does something else on the meta device: nn.init.orthogonal_, for one, does nothing.
            self._recorder.reject(f"{sys._getframe(1).f_code.co_name} skips its work on the meta device")
        result = func(*args, **kwargs)
        if func in _FROM_DATA and on_meta(result) and not _meta_tensors((args[-1:], kwargs)):
            value = func(*args, **(kwargs | {"device": "cpu"}))
            self._recorder.define(result, value)
        return result


def on_meta(tensor: Tensor) -> bool:
    """``tensor.is_meta``, without asking a question that ``PythonCalls`` would take for the model's."""
    return tensor.device.type == "meta"


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor) and on_meta(leaf)]


def _written(func: Any, args: _Args, kwargs: _Kwargs) -> list[Any]:
    """The arguments that the operation's schema says are written."""
    schema = func._schema.arguments
    bound = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    writes = (argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write)
    return [bound[name] for name in writes if name in bound]


def _with_generator(func: Any) -> Any:
    """The overload of a random operation that takes ``generator``, or None."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    return getattr(func.overloadpacket, "generator", None) if func._overloadname == "default" else None


def view_of(tensor: Tensor) -> View:
    return View(
        tensor.untyped_storage()._cdata,
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.dtype,
        tensor.untyped_storage().nbytes() // tensor.itemsize,
    )


def _literal(tensor: Tensor) -> View | Tensor:
    """A meta tensor by its place in its storage; a real one by its value."""
    return view_of(tensor) if on_meta(tensor) else tensor.detach().clone()


def _like(tensor: Tensor) -> Tensor:
    """A meta tensor that only lends its shape and dtype."""
    return tensor.detach()
