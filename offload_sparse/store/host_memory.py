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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def host_zeros(numel: int, dtype: torch.dtype, pin: Switch) -> Tensor:
    """A zeroed host tensor [numel], registered with CUDA unless ``pin`` is ``off`` (``auto`` goes on with
    ordinary memory and a warning when the driver refuses); unregistered when it is freed, at the latest when
    the process ends. Raises ValueError: CUDA refuses to register the memory, or the machine does not have
    it."""
    start = time.perf_counter()
    wanted, size = numel > 0 and pin != "off", numel * dtype.itemsize
    if size < HUGE_FROM and not wanted:
        return torch.zeros(numel, dtype=dtype)
    memory = _map(size)
    tensor = torch.frombuffer(memory, dtype=dtype)  # holds the mapping, which goes with the storage
    # Written at once: memory that the machine does not have is missed now, not hours into a run.
    _touch(tensor)
    pinned = wanted and _page_lock(tensor, memory, required=pin == "on")
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
        raise ValueError(
            f"{size / 2**30:.1f} GiB of host memory cannot be had ({error.strerror}); free memory, or set "
            "store.tier to file"
        ) from error
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        try:
            memory.madvise(getattr(mmap, name))
        except (AttributeError, OSError):  # not Linux, or a kernel built without it
            logger.debug("host memory without %s", name)
    return memory


def _touch(tensor: Tensor) -> None:
    """Write every page, several threads side by side: each page lands near the thread that wrote it."""
    address, size = tensor.data_ptr(), tensor.nbytes
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, size, TOUCH_CHUNK):
            pool.submit(ctypes.memset, address + start, 0, min(TOUCH_CHUNK, size - start))


def _page_lock(tensor: Tensor, memory: mmap.mmap, required: bool) -> bool:
    """Whether CUDA has registered ``tensor``; not yet run on a GPU in this form."""
    error = register(tensor, memory, torch.cuda.cudart())
    if error == 0:
        return True
    message = (
        f"CUDA could not page-lock {tensor.nbytes / 2**30:.1f} GiB of host memory (error {error}); "
        "raise the limit `ulimit -l`, free memory, or set store.pin to off"
    )
    forget_cuda_error()
    if required:
        raise ValueError(message)
    logger.warning("%s. Transfers go on through ordinary memory, which is slower.", message)
    return False


def register(tensor: Tensor, memory: object, cudart: Any, chunk: int = REGISTER_CHUNK) -> int:
    """Register the bytes of ``tensor``, which lie in ``memory``, in chunks, until they are freed or the
    process ends. Returns 0, or CUDA's error, which leaves nothing registered."""
    addresses: list[int] = []
    # The memory is among the arguments, so that it cannot be unmapped before it is unregistered;
    # weakref.finalize runs at the end of the process if it has not run before.
    undo = weakref.finalize(tensor.untyped_storage(), _unregister, addresses, cudart, memory)
    for offset in range(0, tensor.nbytes, chunk):
        address = tensor.data_ptr() + offset
        if error := int(cudart.cudaHostRegister(address, min(chunk, tensor.nbytes - offset), 0)):
            undo()
            return error
        addresses.append(address)
    return 0


def _unregister(addresses: list[int], cudart: Any, memory: object) -> None:
    del memory
    for address in addresses:
        cudart.cudaHostUnregister(address)


def forget_cuda_error() -> None:
    """Take the error that a refusal has left with the CUDA runtime, which would fail the next kernel."""
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        logger.debug("the refused registration has been taken off CUDA's error state")
