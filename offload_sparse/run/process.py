"""What a run sets in its own process; a library constructor sets nothing.

Subnets bring new shapes in every round, and with them new temporaries and new kernels. What the system's
allocator and oneDNN would keep of them counts as the run's memory to its end.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

MAPPED_FROM = 16 << 20
"""Bytes from which freed memory always goes back to the system at once."""

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PLANS = "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"
SEGMENTS, SEGMENTS_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"

_KERNELS_PER_LAYER = 8
"""Two subnets, each with a forward pass for training, one for evaluation, and two products of the backward
pass.
"""

_ROUNDS_OF_PLANS = 4
"""Rounds whose plans cuDNN keeps: about 200 KiB each, and with blocks of channels widths come back."""

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_PR_SET_PDEATHSIG = 1  # of prctl


def bound_memory(factory: Callable[[], nn.Module]) -> None:
    """Have allocations of ``MAPPED_FROM`` bytes and more go back to the system as soon as they are freed,
    oneDNN keep the CPU kernels of one round of the network and no more, and cuDNN the plans of a few.

    glibc starts like this and then raises the bound to 32 MiB as such memory is freed, after which holes of
    that size stay with the process: a tenth of a run's memory in a measured case. oneDNN compiles a kernel
    for every new shape and keeps the last 1024 of them, some megabytes per round, cuDNN the last 10,000 plans
    (2 GiB); they read the bound once, when the first convolution runs. What the user has set stays."""
    _libc("mallopt", _M_MMAP_THRESHOLD, MAPPED_FROM)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        layers = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in factory().modules())
    of_a_round = max(64, _KERNELS_PER_LAYER * layers)
    os.environ.setdefault(KERNELS, str(of_a_round))
    os.environ.setdefault(PLANS, str(_ROUNDS_OF_PLANS * of_a_round))


def grow_segments() -> None:
    """Have the memory of a CUDA device serve the widths of the next round, whatever sizes those of this one
    had: its segments grow and shrink. Set before the device is used; what the user has set stays."""
    if SEGMENTS_BEFORE not in os.environ:  # by its older name, which torch still reads: one of them counts
        os.environ.setdefault(SEGMENTS, "expandable_segments:True")


def return_freed_memory() -> None:
    """Hand memory that the process has freed back to the system (glibc keeps it otherwise): setting up a run
    frees many temporaries of a few megabytes each."""
    gc.collect()
    _libc("malloc_trim", 0)


def end_with_parent() -> None:
    """Have the system ask this process to stop (SIGTERM) once the one that started it is gone, even by
    SIGKILL; on Linux. What it starts instead of itself keeps that."""
    _libc("prctl", _PR_SET_PDEATHSIG, signal.SIGTERM)


def _libc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
