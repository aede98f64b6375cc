"""A model's own initialisation, replayed tensor by tensor, so that no rank ever holds the whole model.

    record   factory() runs on the meta device; what creates or writes a tensor is noted, in program order
    plan     draws that are overwritten later go to a scratch tensor, so that the random stream moves on;
             all else runs as soon as the last draw before it, so that tensors become final one by one
    replay   one generator, one pass over the plan: the bits of ``torch.manual_seed(seed); factory()``

Two modes watch a construction: ``Recorder`` sits in the dispatcher and notes each operation that creates or
writes a tensor without values, ``PythonCalls`` sees what never gets there. Tensors are told apart by their
storage, so views, ``.data``, ``detach`` and Parameters are the same tensor. What is replayed is the very
operation that PyTorch would have run, on the same values and with the same generator state; equality of the
bits needs no knowledge of what an initialiser means. Whatever the recorder does not understand marks the
recording as not replayable, with a reason, and the caller builds the model once instead.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from offload_sparse.channels.model_call import random_states, seeded
from offload_sparse.channels.subnet import meta_copy


def build_seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network as ``torch.manual_seed(seed); factory()`` gives it; the caller's random state stays as it
    is."""
    with seeded(seed):
        return factory()


def initial_tensors(
    recording: Recording, factory: Callable[[], nn.Module], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, one at a time when the recording can be replayed, else of a network
    built whole."""
    if recording.replayable:
        return recording.replay(seed)
    return iter(named_tensors(build_seeded(factory, seed)).items())


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


# --- replaying ---


@dataclass
class _Step:
    """An operation, and the storages that nothing behind it touches; one on a ``scratch`` tensor only moves
    the random stream on."""

    operation: Operation
    scratch: bool = False
    last_of: list[int] = field(default_factory=list)


@dataclass
class Recording:
    """What ``record`` saw of a model's construction.

    Attributes:
        model: the model, all parameters and buffers on the meta device.
        replayable: whether ``replay`` gives the values that the construction gives.
        reason: one line that says why not; empty when it is."""

    model: nn.Module
    reason: str = ""
    _steps: list[_Step] = field(default_factory=list, repr=False)
    _named: dict[int, list[tuple[str, View]]] = field(default_factory=dict, repr=False)
    _constants: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def replayable(self) -> bool:
        return not self.reason

    def replay(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer as ``torch.manual_seed(seed); factory()`` on the CPU would hold it.

        Yields (qualified name, CPU tensor) for all names of ``named_parameters()`` and ``named_buffers()``,
        integer buffers included, each once, in the order in which values become final (the same in every
        process), in the model's own dtypes. What a construction leaves undefined (``torch.empty``) is 0. The
        caller's random state is neither used nor changed.

        At any time the replay holds one tensor of the model and a scratch tensor, beside the one that the
        caller got last (``nn.init.trunc_normal_`` adds its own temporaries; tensors computed from one another
        are held together)."""
        assert self.replayable, f"this initialisation cannot be replayed ({self.reason})"
        generator = torch.Generator().manual_seed(seed)
        held: dict[int, Tensor] = {}
        for name, constant in self._constants.items():
            yield name, constant.clone()
        for step in self._steps:
            with torch.no_grad():
                _run(step.operation, {} if step.scratch else held, generator)
            for storage in step.last_of:
                yield from self._final(storage, held)
        touched = {storage for step in self._steps for storage in step.last_of}
        for storage in self._named:
            if storage not in touched:
                yield from self._final(storage, held)

    def draws(self) -> dict[str, tuple[tuple[str, ...], tuple[float, ...]]]:
        """By name of a tensor the operations that give it its values, and the numbers that they take; of
        tensors that are neither constants nor undefined, in a recording that is replayable."""
        of_storage: dict[int, list[Operation]] = defaultdict(list)
        for step in self._steps:
            if not step.scratch:
                of_storage[step.operation.target.storage].append(step.operation)
        found: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {}
        for storage, operations in of_storage.items():
            leaves = tree_iter([(operation.args, operation.kwargs) for operation in operations])
            numbers = tuple(leaf for leaf in leaves if isinstance(leaf, float))
            drawn = tuple(str(operation.call) for operation in operations), numbers
            found |= {name: drawn for name, _ in self._named.get(storage, [])}
        return found

    def _final(self, storage: int, held: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What has its place in a storage, which is let go: copies, and at last the storage itself."""
        names = self._named.get(storage, [])
        for name, view in names[:-1]:
            yield name, _tensor(view, held).clone()
        for name, view in names[-1:]:
            tensors = [_tensor(view, held)]
            del held[storage]
            yield name, tensors.pop()  # no local name may hold the tensor while the caller has it
        held.pop(storage, None)


def record(factory: Callable[[], nn.Module]) -> Recording:
    """Build a model on the meta device and note how its values come about.

    A model that cannot be built on the meta device (its construction asks for values) is built once for real
    and then moved there; such a recording is not replayable. PyTorch's random state is left as it was."""
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]):
        before = random_states()
        try:
            with torch.device("meta"), recorder, PythonCalls(recorder), recorder.opaque_initialisers():
                model = factory()
        except Exception as error:  # tensors without values may fail anywhere; a real fault fails again below
            message = (str(error) or type(error).__name__).splitlines()[0]
            return Recording(meta_copy(factory()), f"it does not build on the meta device: {message}")
        if random_states() != before:
            recorder.reject("it draws random numbers outside PyTorch's default device and generator")
    return _recording(model, recorder)


def _recording(model: nn.Module, recorder: Recorder) -> Recording:
    """Check that the values of all parameters and buffers are known, and plan their replay."""
    named = [*model.named_parameters(), *model.named_buffers()]
    constants: dict[str, Tensor] = {}
    places: dict[int, list[tuple[str, View]]] = defaultdict(list)
    for name, tensor in named:
        if not on_meta(tensor):
            constants[name] = tensor.detach().clone()
            continue
        if trouble := recorder.trouble(tensor):
            recorder.reject(f"{name}: {trouble}")
        places[view_of(tensor).storage].append((name, view_of(tensor)))
    if constants:
        model = meta_copy(model)
    if recorder.reason:
        return Recording(model, recorder.reason)
    return Recording(model, "", _plan(recorder.operations, set(places)), places, constants)


def _plan(operations: Sequence[Operation], wanted: set[int]) -> list[_Step]:
    """Order the operations so that random ones keep their order and each tensor is final as early as
    possible: a deterministic one runs behind the last operation that has touched any of its storages."""
    live = _live(operations, set(wanted))
    latest: dict[int, int] = {}  # by storage: the place of what touched it last
    placed: list[tuple[int, _Step]] = []
    for number, operation in enumerate(operations):
        if operation in live:
            places = [latest[storage] for storage in operation.touched if storage in latest]
            place = number if operation.random else max(places, default=number)
            latest |= dict.fromkeys(operation.touched, place)
            placed.append((place, _Step(operation)))
        elif operation.random:
            placed.append((number, _Step(operation, scratch=True)))
    steps = [step for _, step in sorted(placed, key=itemgetter(0))]
    last = {storage: step for step in steps if not step.scratch for storage in step.operation.touched}
    for storage, step in last.items():
        step.last_of.append(storage)
    return steps


def _live(operations: Sequence[Operation], wanted: set[int]) -> dict[Operation, None]:
    """The operations that decide a final value, in program order; others are overwritten or never read."""
    live: list[Operation] = []
    for operation in reversed(operations):
        if operation.target.storage in wanted:
            live.append(operation)
            if operation.overwrites:
                wanted.discard(operation.target.storage)
            wanted.update(operation.reads)
    return dict.fromkeys(reversed(live))


def _run(operation: Operation, held: dict[int, Tensor], generator: torch.Generator) -> None:
    """Run one operation on the tensors in ``held``; new ones are added to it."""
    args, kwargs = tree_map_only(View, lambda view: _tensor(view, held), (operation.args, operation.kwargs))
    if operation.random:
        kwargs = kwargs | {"generator": generator}
    result = operation.call(*args, **kwargs)
    if operation.creates:
        assert result.stride() == operation.target.stride, f"{operation.call} lays its result out differently"
        held[operation.target.storage] = result


def _tensor(view: View, held: dict[int, Tensor]) -> Tensor:
    """The tensor at ``view``; a storage that nothing has defined yet is 0."""
    if view.storage not in held:
        held[view.storage] = torch.zeros(view.elements, dtype=view.dtype, device="cpu")
    return held[view.storage].as_strided(view.size, view.stride, view.offset)


# --- recording ---

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]

_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that make a tensor from Python values, which the meta device would lose."""

_UNDEFINED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# Of their tensors only shapes and types are read.
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
        random: the call draws from the generator."""

    call: Callable[..., Any]
    args: _Args
    kwargs: _Kwargs
    target: View
    creates: bool
    overwrites: bool
    reads: tuple[int, ...] = ()
    random: bool = False

    @property
    def touched(self) -> tuple[int, ...]:
        """The storages that it reads or writes."""
        return (*self.reads, self.target.storage)


class Recorder(TorchDispatchMode):
    """Notes every operation that creates or writes a tensor on the meta device.

    Attributes:
        operations: what was understood, in program order.
        undefined: storages that hold something not understood, and why.
        reason: why the recording as a whole is not replayable; empty while it is."""

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
        time of the recording."""
        original: Any = nn.init._no_grad_trunc_normal_

        def noted(tensor: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            if not on_meta(tensor):
                return original(tensor, *args, generator=generator, **kwargs)
            if generator is not None or self.trouble(tensor) == _UNSEEN:
                self.reject("trunc_normal_ draws from a generator of its own or into an unknown tensor")
                return tensor
            view, whole = view_of(tensor), self._whole(tensor)
            self._append(Operation(original, (view, *args), kwargs, view, False, whole, random=True))
            return tensor

        nn.init._no_grad_trunc_normal_ = noted
        try:
            yield
        finally:
            nn.init._no_grad_trunc_normal_ = original

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
            tree_map_only(Tensor, Tensor.detach if name in _LIKE else _literal, args),
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
