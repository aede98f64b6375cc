"""The native copy kernel for host memory: one loop over work items, on raw addresses, without temporaries.

It moves bytes, not numbers, so one compiled function serves every dtype and copies are exact. It is compiled
by numba once per machine and kept in numba's cache; without numba, or without a cache that can be written,
``load`` gives None and callers fall back to torch.

Kept entries are a few cache lines here and there, which no hardware prefetcher foresees. While it copies a
row the kernel therefore asks for the lines of the next one, which pays most where little is kept.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

Kernel = Callable[[int], None]
"""Takes the address of a call, int64[CALL_WIDTH], copies items of it until none is left, and releases the
interpreter lock meanwhile; several threads may take the same call, and share its items.
"""

# Columns of the tables, all int64. numba keeps what it compiled until kernel_source.py changes: whoever moves
# a column changes a line there too.
ITEM_BLOCK, ITEM_ROW, ITEM_ROW_END, ITEM_UNIT, ITEM_UNIT_END, ITEM_WIDTH = 0, 1, 2, 3, 4, 5
BLOCK_UNIT, BLOCK_LENGTHS, SOURCE, TARGET, BLOCK_WIDTH = 0, 1, 2, 8, 14
GRID_START, GRID_ROW_LENGTH, GRID_ROWS, GRID_UNITS, GRID_AHEAD, GRID_DENSE = 0, 1, 2, 3, 4, 5
CALL_ITEMS, CALL_BLOCKS, CALL_INDICES = 0, 1, 2  # addresses of the tables
CALL_FROM, CALL_TO, CALL_SIZE = 3, 4, 5  # addresses of the arrays, bytes per entry
CALL_FROM_GRID, CALL_TO_GRID = 6, 7  # SOURCE and TARGET, or the other way round
CALL_COUNT, CALL_NEXT = 8, 9  # items, and the next that nobody has taken
CALL_STREAM, CALL_WIDTH = 10, 11  # whether to write past the caches

_lock = threading.Lock()
_kernel: Kernel | None = None
_tried = False
_alive: list[Any] = []
"""Compiled functions, whose code goes when they do."""


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

    from offload_sparse.store.copy.native import copy_call

    compiled: Any = numba.cfunc(numba.types.void(numba.types.intp), cache=True)(copy_call)
    _alive.append(compiled)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
