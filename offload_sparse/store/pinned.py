"""Host memory of exact size, page-locked when a CUDA device is there.

torch's pinned allocator rounds every request up to a power of two, which would nearly double a store of the
wrong size.
Here ordinary memory is allocated and registered with the driver, in chunks, so that not a byte more is held.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref

import torch
from torch import Tensor

REGISTER_CHUNK = 64 << 30
"""Largest range registered in one call, in bytes."""


def host_zeros(numel: int, dtype: torch.dtype, pin: bool) -> Tensor:
    """A zeroed host tensor [numel], registered with CUDA when ``pin`` is set; unregistered when it is freed.

    Raises:
        RuntimeError: CUDA refuses to register the memory.
    """
    # Written at once: memory that the machine does not have is missed now, not hours into a run.
    tensor = torch.empty(numel, dtype=dtype).zero_()
    if pin and numel:
        _register(tensor)
    return tensor


def _register(tensor: Tensor) -> None:
    cudart = torch.cuda.cudart()
    start, total = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    registered: list[int] = []
    for offset in range(0, total, REGISTER_CHUNK):
        size = min(REGISTER_CHUNK, total - offset)
        error = int(cudart.cudaHostRegister(start + offset, size, 0))
        if error != 0:
            for address in registered:
                cudart.cudaHostUnregister(address)
            raise RuntimeError(
                f"CUDA could not page-lock {total / 2**30:.1f} GiB of host memory (error {error}); "
                "raise the limit `ulimit -l` or free memory"
            )
        registered.append(start + offset)
    weakref.finalize(tensor.untyped_storage(), _unregister, registered)


def _unregister(addresses: list[int]) -> None:
    cudart = torch.cuda.cudart()
    for address in addresses:
        cudart.cudaHostUnregister(address)


def return_freed_memory() -> None:
    """Hand memory that the process has freed back to the system (glibc keeps it otherwise).

    Setting up a run frees many temporaries of a few megabytes each, which would count as the run's memory to
    its end.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
