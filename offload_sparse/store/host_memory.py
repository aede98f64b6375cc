"""Host memory of exact size, page-locked when a CUDA device is there.

torch's pinned allocator rounds every request up to a power of two, which would nearly double a store of the
wrong size. Here anonymous memory is mapped, offered to the kernel for huge pages, written once by several
threads, and registered with the driver in chunks, so that not a byte more is held. Forked processes (workers
that load data) do not get it: their copies of page-locked pages would cost as much again.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload_sparse.store.config import Switch

REGISTER_CHUNK = 64 << 30
"""Largest range registered in one call, in bytes."""

TOUCH_CHUNK = 64 << 20
"""Bytes that a thread writes at a time; a multiple of every page size."""

HUGE_FROM = 4 << 20
"""Smaller tensors come from torch's allocator: huge pages would not help them."""

logger = logging.getLogger(__name__)


def pin_mode(pin: Switch, device: torch.device) -> Switch:
    """What ``store.pin`` asks for on ``device``: ``off`` unless it is a CUDA device. Raises ValueError:
    ``on`` without a CUDA device."""
    if device.type == "cuda":
        return pin
    if pin == "on":
        raise ValueError("store.pin is on, but the run uses no CUDA device; set store.pin to auto")
    return "off"


def host_zeros(numel: int, dtype: torch.dtype, pin: Switch | bool) -> Tensor:
    """A zeroed host tensor [numel], registered with CUDA unless ``pin`` is ``off`` or False (``auto`` goes on
    with ordinary memory and a warning when the driver refuses); unregistered when it is freed, at the latest
    when the process ends. Raises RuntimeError: CUDA refuses to register the memory, or the machine does not
    have it."""
    start = time.perf_counter()
    # Written at once: memory that the machine does not have is missed now, not hours into a run.
    wanted = bool(numel) and pin not in ("off", False)
    if numel * dtype.itemsize < HUGE_FROM and not wanted:
        return torch.zeros(numel, dtype=dtype)
    memory = _map(numel * dtype.itemsize)
    tensor = torch.frombuffer(memory, dtype=dtype)  # holds the mapping, which goes with the storage
    _touch(tensor)
    pinned = wanted and _register(tensor, memory, pin != "auto")
    size = tensor.numel() * tensor.element_size()
    kind = "page-locked host memory" if pinned else "host memory"
    logger.info("%.3f GiB of %s in %.2f s", size / 2**30, kind, time.perf_counter() - start)
    return tensor


def threads() -> int:
    """Threads that share work on host memory: this rank's part of the cores that its node lets it use.

    OMP_NUM_THREADS, which accelerate launch sets to 1, says nothing about it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _map(size: int) -> mmap.mmap:
    """``size`` bytes of zeroed anonymous memory, in huge pages where the kernel offers them."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"{size / 2**30:.1f} GiB of host memory cannot be had: {error}") from error
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        try:
            memory.madvise(getattr(mmap, name))
        except (AttributeError, OSError):  # not Linux, or a kernel built without it
            logger.debug("host memory without %s", name)
    return memory


def _touch(tensor: Tensor) -> None:
    """Write every page, several threads side by side: each page lands near the thread that wrote it."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, size, TOUCH_CHUNK):
            pool.submit(ctypes.memset, address + start, 0, min(TOUCH_CHUNK, size - start))


@dataclass(eq=False)
class Registration:
    """Ranges of host memory that are page-locked, undone at most once.

    Attributes:
        register: (address, bytes) -> 0 or CUDA's error.
        unregister: address -> anything."""

    register: Callable[[int, int], int]
    unregister: Callable[[int], object]
    addresses: list[int] = field(default_factory=list)

    def add(self, start: int, size: int, chunk: int = REGISTER_CHUNK) -> int:
        """Register [start, start + size) in chunks; on an error, undo what was done and return the error."""
        for offset in range(0, size, chunk):
            error = int(self.register(start + offset, min(chunk, size - offset)))
            if error:
                self.undo()
                return error
            self.addresses.append(start + offset)
        return 0

    def undo(self) -> None:
        """Unregister what is registered."""
        while self.addresses:
            self.unregister(self.addresses.pop())


def _register(tensor: Tensor, memory: mmap.mmap, required: bool) -> bool:
    """Page-lock ``tensor``; not yet run on a GPU in this form."""
    cudart = torch.cuda.cudart()
    registration = Registration(
        lambda address, size: cudart.cudaHostRegister(address, size, 0), cudart.cudaHostUnregister
    )
    size = tensor.numel() * tensor.element_size()
    error = registration.add(tensor.data_ptr(), size)
    if error == 0:
        keep_registered(tensor, registration, memory)
        return True
    message = (
        f"CUDA could not page-lock {size / 2**30:.1f} GiB of host memory (error {error}); "
        "raise the limit `ulimit -l`, free memory, or set store.pin to off"
    )
    forget_cuda_error()
    if required:
        raise RuntimeError(message)
    logger.warning("%s. Transfers go on through ordinary memory, which is slower.", message)
    return False


def forget_cuda_error() -> None:
    """Take the error that a refusal has left with the CUDA runtime, which would fail the next kernel."""
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        logger.debug("the refused registration has been taken off CUDA's error state")


def keep_registered(tensor: Tensor, registration: Registration, memory: object) -> None:
    """Undo ``registration`` when the memory of ``tensor`` is freed, or when the process ends before."""
    # The memory itself is among the arguments, so that it cannot be unmapped before it is unregistered;
    # weakref.finalize runs at the end of the process if it has not run before.
    weakref.finalize(tensor.untyped_storage(), _release, registration, memory)


def _release(registration: Registration, memory: object) -> None:
    del memory
    registration.undo()
