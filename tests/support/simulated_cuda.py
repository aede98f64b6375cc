"""A CUDA device that is not there: tensors say that they are on it and compute on the CPU; what a program
could do wrong with a device is an error or is counted.

    tensors    operations that mix device and CPU tensors raise; waits for the device and uploads are noted,
               with the line of the package that made them
    streams    an operation on a stream that has not waited for the last write of what it reads (or for the
               last reads of what it writes) on another stream raises, whatever the threads' luck was
    devices    every thread begins on device 0, as with CUDA, while the simulated one is number 1: who uses a
               stream without having set its thread's device is noted
    groups     collectives of the default group, and of groups made without a backend, refuse CPU tensors, as
               NCCL does; gloo groups refuse device tensors

Values are those of the CPU, bit for bit.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from offload_sparse.store.copy import device_copy, torch_copy

DEVICE = torch.device("cuda", 1)

_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint")
_VIEWS = {
    *("view", "detach", "slice", "select", "expand", "t", "transpose", "permute", "as_strided", "split"),
    *("unsqueeze", "squeeze", "alias", "_unsafe_view", "unbind", "split_with_sizes", "_reshape_alias"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "is_same_size"),
}
"""Operations for which a device does nothing."""


@dataclass
class Access:
    """The last accesses of a piece of memory: (stream, its time)."""

    write: tuple[int, int] = (0, 0)
    reads: dict[int, int] = field(default_factory=dict)


class Stream:
    """A stream: what it has waited for, as the time of every other stream."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = DEVICE
        self.known: dict[int, int] = {}

    def tick(self) -> int:
        self.known[id(self)] = self.known.get(id(self), 0) + 1
        return self.known[id(self)]

    def meet(self, known: dict[int, int]) -> None:
        for stream, time in known.items():
            self.known[stream] = max(time, self.known.get(stream, 0))

    def record_event(self, event: Any = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.meet(event.known)

    def wait_stream(self, other: Stream) -> None:
        self.meet(dict(other.known))

    def synchronize(self) -> None:
        present().wait("stream.synchronize")


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.known: dict[int, int] = {}
        self.number = 0
        self.simulation = present()

    def record(self, stream: Stream | None = None) -> None:
        self.known = dict((stream or present().stream()).known)
        self.number = present().operations.total()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return float(other.number - self.number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or present().stream()).wait_event(self)

    def synchronize(self) -> None:
        """Counted where the event was made, whatever is simulated by then."""
        self.simulation.wait("event.synchronize")


class Simulation:
    """What a program has done with the device.

    Attributes:
        waits: (what, line of the package, thread) of everything that waits for the device.
        uploads: (line, thread) of everything that is sent to it.
        operations: how often the device was given which operation.
        wrong_device: lines that used a stream in a thread whose device was not set.
    """

    def __init__(self) -> None:
        self.waits: list[tuple[str, str, str]] = []
        self.uploads: list[tuple[str, str]] = []
        self.operations: Counter[str] = Counter()
        self.wrong_device: list[str] = []
        self.default = Stream()
        self._thread = threading.local()
        self._memory: dict[int, Access] = {}
        self._lock = threading.RLock()

    def stream(self) -> Stream:
        return getattr(self._thread, "stream", self.default)

    def set_stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    def set_device(self, device: Any) -> None:
        self._thread.device = torch.device("cuda", device) if isinstance(device, int) else device

    def check_device(self) -> None:
        if getattr(self._thread, "device", None) != DEVICE:
            self.wrong_device.append(place())

    def wait(self, what: str) -> None:
        self.waits.append((what, place(), threading.current_thread().name))

    def upload(self) -> None:
        self.uploads.append((place(), threading.current_thread().name))

    def accessed(self, reads: Sequence[Tensor], writes: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
        """Check that the thread's stream may read and write this memory now; ``fresh`` is new."""
        with self._lock:
            stream = self.stream()
            time = stream.tick()
            for address in addresses(fresh):
                self._memory[address] = Access((id(stream), time))
            for address in addresses(reads):
                self._after(stream, address, "read", [self._memory.setdefault(address, Access()).write])
                self._memory[address].reads[id(stream)] = time
            for address in addresses(writes):
                access = self._memory.setdefault(address, Access())
                self._after(stream, address, "written", [access.write, *access.reads.items()])
                self._memory[address] = Access((id(stream), time))

    def _after(self, stream: Stream, address: int, what: str, others: Sequence[tuple[int, int]]) -> None:
        for other, time in others:
            if other not in (0, id(stream)) and stream.known.get(other, 0) < time:
                raise RuntimeError(f"memory is {what} on a stream that has not waited for another: {place()}")


class Simulated(Tensor):
    """A tensor on the simulated device."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[Simulated], inner: Tensor, requires_grad: bool = False) -> Simulated:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Simulated({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        copy = Simulated(self.inner.detach().clone(), self.requires_grad)
        if isinstance(self, nn.Parameter):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (bool, int, float)):
            keys = index if isinstance(index, tuple) else (index,)
            chosen = any(isinstance(key, Tensor) and key.dtype != torch.bool for key in keys)
            if chosen or self.inner[of_inner(index)].dim() == 0:
                present().upload()
                present().wait("a number")  # in the place of slices CUDA fills: nothing is sent
            value = torch.full((), value, dtype=self.dtype, device=DEVICE)
        super().__setitem__(index, value)

    def tolist(self) -> Any:
        present().wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:1 device type tensor to numpy")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


_PRESENT: list[Simulation] = []


def present() -> Simulation:
    return _PRESENT[-1]


def place() -> str:
    """The innermost line of the package, or of a test, that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/offload_sparse/" in file or frame.f_code.co_name.startswith("test_"):
            line = linecache.getline(file, frame.f_lineno).strip()
            return f"{file.rsplit('/', 1)[1]}:{frame.f_lineno} {line}"
        frame = frame.f_back
    return "outside"


def addresses(tensors: Sequence[Tensor]) -> set[int]:
    """Where the memory of ``tensors`` begins."""
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def of_inner(tree: Any) -> Any:
    return tree_map_only(Simulated, lambda t: t.inner, tree)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    device = kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = any(isinstance(t, Simulated) for t in tensors)
    if device is not None:  # a gradient's zeros are where C++ takes its tensor to be
        here = torch.device(device).type == "cuda" or (here and name == "new_zeros")
        kwargs["device"] = torch.device("cpu")
    _check_mix(name, func, tensors)
    if name in _WAITS:
        present().wait(name)
    if name in _COPIES:
        _note_copy(name, args, kwargs, here)
    result = func(*of_inner(args), **of_inner(kwargs))
    _note_access(name, func, args, kwargs, result)
    if func._schema.is_mutable:
        return _own(func, args, kwargs, result)
    return tree_map_only(Tensor, Simulated, result) if here else result


def _check_mix(name: str, func: Any, tensors: Sequence[Tensor]) -> None:
    others = [t for t in tensors if not isinstance(t, Simulated) and t.dim()]
    if not others or name in _COPIES or len(others) == len(tensors):
        return
    if name in _INDEXING and all(t.dtype in (torch.int64, torch.bool) for t in others):
        present().wait("an index on the CPU")
        return
    found = f"but found at least two devices, {DEVICE} and cpu!"
    raise RuntimeError(f"Expected all tensors to be on the same device, {found} ({func} at {place()})")


def _note_copy(name: str, args: Any, kwargs: dict[str, Any], here: bool) -> None:
    source = args[1] if name == "copy_" else args[0]
    to_device = isinstance(args[0], Simulated) if name == "copy_" else here
    if isinstance(source, Simulated) == to_device:
        return
    non_blocking = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
    if to_device:
        present().upload()
    if not (to_device and non_blocking):
        present().wait("upload" if to_device else "download")


def _note_access(name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    if name in _VIEWS:
        fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor)] if "empty" in name else []
        present().accessed([], [], fresh)
        return
    present().operations[name] += 1
    written = [t for t in tree_leaves(_written(func, args, kwargs)) if isinstance(t, Simulated)]
    own = {id(t) for t in written}
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Simulated) and id(t) not in own]
    read = [] if name.startswith("new_") or name.endswith("_like") else read  # only shapes and types of it
    known = addresses([t.inner for t in (*read, *written)])
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    fresh = [t for t in results if not addresses([t]) & known]
    present().accessed([t.inner for t in read], [t.inner for t in written], fresh)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(kwargs[argument.name] if argument.name in kwargs else args[number])
    return found


def _own(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """What an operation that writes its arguments gives back: those, not their inner tensors."""
    if result is None:
        return None
    written = _written(func, args, kwargs)
    if isinstance(result, Tensor):
        return written[0]
    returned = [bool(r.alias_info is not None and r.alias_info.is_write) for r in func._schema.returns]
    queue = iter(written)
    return type(result)(
        next(queue) if own else tree_map_only(Tensor, Simulated, value)
        for own, value in zip(returned, result, strict=True)
    )


# --- what is put in place of torch's functions ---


def _factory(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        if (device := kwargs.get("device")) is None or torch.device(device).type != "cuda":
            return original(*args, **kwargs)
        if original.__name__ == "as_tensor" and isinstance(args[0], Simulated):
            return args[0].to(**kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = original(*args, **(kwargs | {"device": "cpu"}))
        if original.__name__ in ("tensor", "as_tensor"):
            present().upload()
            present().wait("upload")
        elif original.__name__ != "empty":
            present().operations[original.__name__] += 1
        present().accessed([], [], [made])
        return Simulated(made, grad)

    return made


def _to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
        dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        others = [a for a in args if isinstance(a, Tensor)]
        device = torch.device(places[0]) if places else others[0].device if others else self.device
        dtype = dtypes[0] if dtypes else others[0].dtype if others else self.dtype
        if device.type == self.device.type or "meta" in (device.type, self.device.type):
            if device.type != "cuda":
                return original(self, *args, **kwargs)
            layout = kwargs.get("memory_format", torch.preserve_format)
            return original(self, dtype, copy=kwargs.get("copy", False), memory_format=layout)
        if device.type == "cuda":
            present().upload()
            if not kwargs.get("non_blocking"):
                present().wait("upload")
            made = original(self.detach(), dtype, copy=True)
            present().accessed([], [], [made])
            return Simulated(made)
        assert isinstance(self, Simulated)
        present().wait("download")
        present().accessed([self.inner], [], [])
        return original(self.inner.detach(), dtype, copy=True)

    return to


def _module_to(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Parameters of the CPU cannot become the device's: they are made anew, those that are there stay."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        if all(t.device == (device or t.device) and t.dtype == (dtype or t.dtype) for t in tensors):
            return self
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
            return original(self, *args, **kwargs)

    return to


def _collective(original: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        groups = [g for g in (*args, *kwargs.values()) if isinstance(g, dist.ProcessGroup)]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        _check_group(tensors, groups)
        present().operations[original.__name__] += any(isinstance(t, Simulated) for t in tensors)
        return original(*of_inner(args), **of_inner(kwargs))

    return checked


def _batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def checked(transfers: list[dist.P2POp]) -> Any:
        for transfer in transfers:
            _check_group([transfer.tensor], [g for g in (transfer.group,) if g is not None])
            transfer.tensor = of_inner(transfer.tensor)
        return original(transfers)

    return checked


def _check_group(tensors: Sequence[Tensor], groups: Sequence[dist.ProcessGroup]) -> None:
    on_device = not groups or groups[0] not in _GLOO
    for tensor in tensors:
        if isinstance(tensor, Simulated) != on_device:
            backend, kind = ("NCCL", "CPU") if on_device else ("gloo", "device")
            raise RuntimeError(f"a {backend} group was given a {kind} tensor: {place()}")
    present().accessed([], [of_inner(tensor) for tensor in tensors if on_device], [])


def _grouped(original: Callable[..., Any]) -> Any:
    """Optimizers group by the device of C++, which is the CPU here."""

    def grouped(lists: Any, *args: Any, **kwargs: Any) -> Any:
        here = any(isinstance(t, Simulated) for t in tree_leaves(lists))
        found = original(lists, *args, **kwargs)
        return {(DEVICE if here else device, dtype): value for (device, dtype), value in found.items()}

    return staticmethod(grouped)


_GLOO: list[dist.ProcessGroup] = []


def _new_group(original: Callable[..., Any]) -> Callable[..., Any]:
    def made(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = original(ranks, *args, backend=backend, **kwargs)
        if backend == "gloo":
            _GLOO.append(group)
        return group

    return made


class _Cudart:
    """The runtime: page-locks what it is asked to, or nothing."""

    def __init__(self, locks: bool, locked: set[int]) -> None:
        self._locks, self._locked = locks, locked

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self._locks:
            self._locked.add(address)
        return 0 if self._locks else 2

    def cudaHostUnregister(self, address: int) -> int:
        self._locked.discard(address)
        return 0


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    sim = present()
    sim.check_device()
    before = sim.stream()
    sim.set_stream(stream or before)
    yield
    sim.set_stream(before)


@contextmanager
def simulated_cuda(triton: bool = True, pinned: bool = True, zero_copy: bool = True) -> Iterator[Simulation]:
    """Inside, there is the simulated device ``DEVICE``, this thread's.

    Args:
        triton: the copy kernel works (its effect is had by indexing, as one operation without uploads).
        pinned: host memory can be page-locked.
        zero_copy: the kernel beats staging.
    """
    sim, locked = Simulation(), set[int]()
    _PRESENT.append(sim)
    sim.set_device(DEVICE)
    is_pinned = Tensor.is_pinned
    with pytest.MonkeyPatch.context() as patch:
        for name in _FACTORIES:
            patch.setattr(torch, name, _factory(getattr(torch, name)))
        patch.setattr(Tensor, "to", _to(Tensor.to))
        patch.setattr(Tensor, "cuda", lambda self, *_, **more: self.to(DEVICE, **more))
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
        patch.setattr(Tensor, "is_pinned", lambda self, *_: self.data_ptr() in locked or is_pinned(self))
        grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype
        patch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", _grouped(grouped))
        patch.setattr(nn.Module, "to", _module_to(nn.Module.to))
        patch.setattr(torch, "inference_mode", lambda *_: torch.no_grad())
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": _on_stream,
            "current_stream": lambda device=None: sim.stream(),
            "device": lambda device: nullcontext(),
            "set_device": sim.set_device,
            "current_device": lambda: DEVICE.index,
            "synchronize": lambda *_: sim.wait("cuda.synchronize"),
            "cudart": lambda: _Cudart(pinned, locked),
        }.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor"):
            patch.setattr(dist, name, _collective(getattr(dist, name)))
        patch.setattr(dist, "batch_isend_irecv", _batch(dist.batch_isend_irecv))
        patch.setattr(dist, "new_group", _new_group(dist.new_group))
        patch.setattr(device_copy, "triton_works", lambda device: triton)
        patch.setattr(device_copy, "zero_copy_is_faster", lambda *_: triton and zero_copy)
        patch.setattr(device_copy, "launch", _launched)
        patch.setattr(device_copy, "_HOST", device_copy._HostStaging())  # it keeps events of the device
        try:
            yield sim
        finally:
            _PRESENT.pop()


def _launched(plan: Any, source: Tensor, target: Tensor, reverse: bool, device: torch.device) -> None:
    """The copy kernel: reads and writes device memory and page-locked host memory."""
    sim = present()
    assert all(isinstance(t, Simulated) or t.is_pinned() for t in (source, target)), "not page-locked"
    device_copy.send_to_kernel([plan], device)
    sim.operations["copy_blocks"] += 1
    tables = [table.inner for table in plan.sent[device]]
    giver, taker = (target, source) if reverse else (source, target)
    written = [t.inner for t in (taker,) if isinstance(t, Simulated)]
    sim.accessed([t.inner for t in (giver,) if isinstance(t, Simulated)] + tables, written, [])
    torch_copy.copy_by_torch(plan, *of_inner((source, target)), reverse)
