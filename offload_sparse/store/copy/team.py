"""Threads for the native kernel: those that torch computes with.

torch's OpenMP threads wait for their next work by spinning for some milliseconds. Other threads that begin
to copy then share the cores with them, and take up to twice as long. So the team that has just computed
copies, too: through ``GOMP_parallel``, which the OpenMP runtimes of GCC and LLVM export. Where it is not
found, and on threads other than the main one (whose copies run beside the computation), a pool of our own
threads works.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

Work = Callable[[int], None]
"""Takes the address of its arguments; a ctypes function, which releases the interpreter lock."""

_RUNTIMES = ("libgomp", "libiomp", "libomp")
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def run_on_team(work: Work, arguments: int, threads: int) -> None:
    """Call ``work(arguments)`` on about so many threads at once, this one among them, and wait for all.

    Args:
        work: shares out what there is to do among its callers.
        arguments: address of what ``work`` takes.
        threads: 1 or ``torch.get_num_threads()``: OpenMP ends threads that a smaller team has no use for.
    """
    if threads == 1:
        work(arguments)
        return
    parallel = _openmp() if threading.current_thread() is threading.main_thread() else None
    if parallel is not None:
        parallel(work, arguments, threads, 0)
    else:
        helpers = [_pool(threads).submit(work, arguments) for _ in range(threads - 1)]
        work(arguments)
        for helper in helpers:
            helper.result()


@cache
def _openmp() -> Callable[[Work, int, int, int], None] | None:
    """``GOMP_parallel`` of the runtime that torch has loaded; None without one."""
    for path in _runtimes():
        try:
            parallel = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def _runtimes() -> list[str]:
    """OpenMP libraries in this process, that beside torch first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return []
    mapped = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    found = [path for path in mapped if Path(path).name.startswith(_RUNTIMES)]
    beside_torch = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda path: (not path.startswith(beside_torch), path))


def _pool(threads: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
        return _pools[threads]
