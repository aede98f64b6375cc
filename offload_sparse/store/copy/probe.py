"""Which way between host memory and a CUDA device is faster: measured once per device.

Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Callable
from statistics import median

import torch

from offload_sparse.store.copy.blocks import Block, Grid

logger = logging.getLogger(__name__)

ROWS, COLUMNS, WINDOW = 1024, 1024, 9
"""The array that is probed: a 3x3 convolution, 36 MiB, of which every other row and column is kept."""

REPETITIONS = 5


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def zero_copy_is_faster(device: torch.device) -> bool:
    """Whether kernels that read page-locked memory directly beat staging and a copy; False if they fail."""
    if not has_triton():
        return False
    try:
        seconds = _measure(device)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        logger.warning(
            "host transfers are staged: the Triton kernel failed (%s: %s)", type(error).__name__, reason
        )
        return False
    direct, staged = seconds
    chosen = "direct" if direct < staged else "staged"
    logger.info("host transfers are %s: direct %.2f ms, staged %.2f ms", chosen, 1e3 * direct, 1e3 * staged)
    return direct < staged


def _measure(device: torch.device) -> tuple[float, float]:
    """Median seconds of a gather, direct and staged."""
    from offload_sparse.store.copy.copy import BlockPlan
    from offload_sparse.store.copy.device_copy import copy_staged
    from offload_sparse.store.copy.triton_kernels import DeviceTables, launch
    from offload_sparse.store.host_memory import host_zeros

    rows, columns = torch.arange(0, ROWS, 2), torch.arange(0, COLUMNS, 2)
    source = Grid(0, COLUMNS * WINDOW, rows, columns)
    block = Block(len(rows), len(columns), WINDOW, source, Grid(0, len(columns) * WINDOW))
    plan = BlockPlan([block])
    host = host_zeros(ROWS * COLUMNS * WINDOW, torch.float32, "on")
    out = torch.empty(plan.entries, device=device)
    with torch.cuda.device(device):
        tables = DeviceTables(plan.blocks, device)
        direct = _seconds(lambda: launch(tables, host, out, False))
        staged = _seconds(lambda: copy_staged(plan, host, out, False))
    return direct, staged


def _seconds(transfer: Callable[[], None]) -> float:
    seconds = []
    for _ in range(REPETITIONS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        transfer()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])
