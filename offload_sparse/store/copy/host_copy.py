"""Copies of blocks in host memory: the native kernel on several threads, torch's indexing without it.

The kernel moves bytes, not numbers, so one compiled function serves every dtype and copies are exact. numba
compiles it once per machine and keeps it in its cache; without numba, or without a cache that can be written,
transfers by torch are right, too. The threads are our own: OpenMP's belong to the thread that computes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from torch import Tensor

from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.tables import Tables
from offload_sparse.store.copy.torch_copy import copy_by_torch
from offload_sparse.store.host_memory import threads

NATIVE_FROM = 1 << 18
"""Entries from which a transfer is worth loading the native kernel (half a second)."""

THREADS_FROM = 1 << 17
"""Entries from which a transfer is worth waking other threads."""

STREAM_FROM = 32 << 20
"""Bytes from which a narrow array is written past the caches, which could not hold it anyway."""

Kernel = Callable[[int], None]
"""Takes the address of a call, int64[CALL_WIDTH], copies items of it until none is left, and releases the
interpreter lock meanwhile; several threads may take the same call, and share its items.
"""

logger = logging.getLogger(__name__)


@cache
def load() -> Kernel | None:
    """The compiled kernel, from numba's cache or compiled now (seconds, once per machine); None, with a
    warning in the log, where that is impossible."""
    start = time.perf_counter()
    try:
        from offload_sparse.store.copy.native import compiled

        kernel = compiled()
    except Exception as error:  # whatever numba raises
        logger.warning(
            "transfers go through torch, which is slower: no native kernel (%s: %s); install numba, "
            "or set NUMBA_CACHE_DIR to a folder that can be written",
            type(error).__name__,
            " ".join(str(error).split())[:200],
        )
        return None
    logger.info("native transfer kernel ready in %.2f s", time.perf_counter() - start)
    return kernel


def prepare(entries: int) -> None:
    """Load the kernel now if a store of so many entries will want it, rather than in the first round: torch
    takes 16 bytes of numbers for each entry of a plan, and keeps them with it."""
    if entries >= NATIVE_FROM:
        load()


def copy_in_host_memory(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    """``copy_blocks`` for arrays in host memory."""
    wanted = load.cache_info().currsize or plan.entries * len(pairs) >= NATIVE_FROM
    kernel = load() if wanted else None
    if kernel is None:
        for source, target in pairs:
            copy_by_torch(plan, source, target, reverse)
    else:
        copy_natively(kernel, plan, pairs, reverse)


def copy_natively(
    kernel: Kernel, plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool
) -> None:
    """The same by the kernel."""
    helpers = threads() - 1 if plan.entries * len(pairs) >= THREADS_FROM else 0
    for source, target in pairs:
        size = plan.entries * source.element_size()
        call = plan.derived(Tables).call(source, target, reverse, stream=size >= STREAM_FROM)
        pending = [_pool(os.getpid()).submit(kernel, call.ctypes.data) for _ in range(helpers)]
        kernel(call.ctypes.data)
        for helper in pending:
            helper.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """This process's threads; those of a parent do not survive a fork."""
    del process
    return ThreadPoolExecutor(threads(), thread_name_prefix="copy")
