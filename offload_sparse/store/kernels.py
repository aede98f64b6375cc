"""The native copy kernel for host memory: one loop over work items, on raw addresses, without temporaries.

It moves bytes, not numbers, so one compiled function serves every dtype and copies are exact. It is compiled
by numba once per machine and kept in numba's cache; without numba, or without a cache that can be written,
``load`` gives None and callers fall back to torch.

Kept entries are a few cache lines here and there, which no hardware prefetcher foresees. While it copies a
row the kernel therefore asks for the lines of the next one, which pays most where little is kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Kernel = Callable[[int, int, int, int, int, int, int, int, int, int], None]
"""(address of items, of blocks, of indices, first item, last item + 1, source address, target address, bytes
per entry, column of the source grid, column of the target grid); releases the interpreter lock."""

# Columns of the tables, all int64. numba keeps what it compiled until kernel_source.py changes: whoever moves
# a column changes a line there too.
ITEM_BLOCK, ITEM_ROW, ITEM_ROW_END, ITEM_UNIT, ITEM_UNIT_END, ITEM_WIDTH = 0, 1, 2, 3, 4, 5
BLOCK_UNIT, BLOCK_LENGTHS, SOURCE, TARGET, BLOCK_WIDTH = 0, 1, 2, 7, 12
GRID_START, GRID_ROW_LENGTH, GRID_ROWS, GRID_UNITS, GRID_AHEAD = 0, 1, 2, 3, 4

_lock = threading.Lock()
_kernel: Kernel | None = None
_tried = False


def load() -> Kernel | None:
    """The compiled kernel, from numba's cache or compiled now (seconds, once per machine); None, with one
    warning in the log, where that is impossible.
    """
    global _kernel, _tried
    with _lock:
        if not _tried:
            _tried = True
            start = time.perf_counter()
            try:
                _kernel = _compile()
            except Exception as error:
                # Whatever numba raises, transfers by torch are right too.
                reason = " ".join(str(error).split())[:200]
                logger.warning(
                    "transfers go through torch, which is slower: no native kernel (%s: %s); install numba, "
                    "or set NUMBA_CACHE_DIR to a folder that can be written",
                    type(error).__name__,
                    reason,
                )
            else:
                logger.info("native transfer kernel ready in %.2f s", time.perf_counter() - start)
        return _kernel


def loaded() -> bool:
    """Whether ``load`` has found a kernel already."""
    return _kernel is not None


def _compile() -> Kernel:
    import numba

    from offload_sparse.store.kernel_source import copy_items

    integer = numba.types.intp
    signature = numba.types.void(*[integer] * 10)
    return numba.njit([signature], nogil=True, cache=True)(copy_items)
