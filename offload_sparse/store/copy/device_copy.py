"""Copies of blocks in which a CUDA device takes part: a Triton kernel, staging, and a probe that chooses.

The kernel runs one program per piece of a block, in either direction. Both arrays may be device memory, or
one of them page-locked host memory that the device reads or writes directly (zero-copy), so that only kept
entries cross the bus and nothing is staged. Run in Triton's interpreter and compiled ahead of time only so
far, not yet on a GPU.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_sparse.store.config import Switch
from offload_sparse.store.copy.blocks import (
    COUNTED,
    N_UNITS,
    SOURCE,
    TARGET,
    UNIT,
    BlockPlan,
    batches,
    part_of_matrix,
)
from offload_sparse.store.copy.host_copy import copy_in_host_memory
from offload_sparse.store.copy.tables import DeviceTables, used_now
from offload_sparse.store.copy.torch_copy import copy_by_torch, numbers_of
from offload_sparse.store.host_memory import host_zeros

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except Exception:  # none, or one that cannot be imported: ``triton_works`` says so, and torch copies

    def jit(function: Any) -> Any:
        return function


STAGE = 1 << 23
"""Entries staged at a time: while one part crosses the bus, the next is gathered."""

PROGRAM = 1 << 13
"""Entries per program."""

STEP = 1 << 10
"""Entries that a program copies at a time."""

PROBED = 1024
"""Rows and units per row of the array that is probed, of which every other is kept: 4 or 36 MiB."""

NARROW, WIDE = 1, 9
"""Entries per unit for which ways are compared: a matrix, and a 3x3 convolution."""

_REPETITIONS = 5

logger = logging.getLogger(__name__)


def copy_with_device(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """``copy_blocks`` for one pair of arrays of which at least one is on a CUDA device."""
    device = source.device if source.device.type == "cuda" else target.device
    triton_works(device)  # found out by the first transfer of a run, not inside a step
    host = [array for array in (source, target) if array.device.type == "cpu"]
    if not host:
        _copy_on_device(plan, source, target, reverse)
        return
    to_host = (source if reverse else target) is host[0]
    if is_direct(plan, host[0], device, to_host):
        launch(plan, source, target, reverse, device)
        if to_host:
            torch.cuda.current_stream(device).synchronize()
        return
    copy_staged(plan, source, target, reverse)


def is_direct(plan: BlockPlan, host: Tensor, device: torch.device, to_host: bool) -> bool:
    """Whether a kernel reads or writes ``host`` itself."""
    return host.is_pinned() and zero_copy_is_faster(device, to_host, _unit(plan))


def copy_staged(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy through packed memory: blocks are moved by the processor that holds them, runs cross the bus."""
    for into, out_of in plan.derived(_stages, STAGE):
        if reverse:
            _send(out_of, into, target, source, reverse)
        else:
            _send(into, out_of, source, target, reverse)


def _send(first: BlockPlan, second: BlockPlan, giver: Tensor, taker: Tensor, reverse: bool) -> None:
    """Pack at the giver, cross, unpack at the taker; runs need neither, but what leaves host memory does so
    from staging, where nothing is written while it is on its way."""
    near, far = (TARGET, SOURCE) if reverse else (SOURCE, TARGET)
    left, right = first.run(near) if giver.device.type == "cuda" else None, second.run(far)
    packed = _empty_near(giver, first.entries) if left is None else giver[left]
    if left is None:
        _copy(first, giver, packed, reverse)
    arrived = _empty_near(taker, second.entries) if right is None else taker[right]
    arrived.copy_(packed, non_blocking=taker.device.type == "cuda")
    if right is None:
        _copy(second, arrived, taker, reverse)
    if taker.device.type == "cuda":
        _HOST.leaves(taker.device)


class _HostStaging(threading.local):
    """Two pieces of page-locked memory per thread, made once, that take turns."""

    def __init__(self) -> None:
        self._pieces = [torch.empty(0, dtype=torch.uint8)] * 2
        self._left: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def empty(self, entries: int, dtype: torch.dtype) -> Tensor:
        """[entries] that no copy to a device reads any more."""
        turn = self._turn = 1 - self._turn
        if (left := self._left[turn]) is not None:
            left.synchronize()
        size = entries * dtype.itemsize
        if self._pieces[turn].numel() < size:
            room, pin = 1 << (size - 1).bit_length(), torch.cuda.is_available()
            self._pieces[turn] = torch.empty(room, dtype=torch.uint8, pin_memory=pin)
        return self._pieces[turn][:size].view(dtype)

    def leaves(self, device: torch.device) -> None:
        """A copy from the last piece to ``device`` is on its way."""
        self._left[self._turn] = torch.cuda.current_stream(device).record_event()


_HOST = _HostStaging()


def _empty_near(array: Tensor, entries: int) -> Tensor:
    if array.device.type == "cpu":
        return _HOST.empty(entries, array.dtype)
    return torch.empty(entries, dtype=array.dtype, device=array.device)


def _copy(plan: BlockPlan, giver: Tensor, taker: Tensor, reverse: bool) -> None:
    source, target = (taker, giver) if reverse else (giver, taker)
    if source.device.type == "cpu":
        copy_in_host_memory(plan, [(source, target)], reverse)
    else:
        _copy_on_device(plan, source, target, reverse)


def _copy_on_device(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    if triton_works(source.device):
        launch(plan, source, target, reverse, source.device)
    else:
        copy_by_torch(plan, source, target, reverse)


def _stages(plan: BlockPlan, size: int) -> list[tuple[BlockPlan, BlockPlan]]:
    """Groups of at most ``size`` entries (or one block): source array -> packed, packed -> target array."""
    stages = []
    for part in batches(plan.counts, size):
        into, out_of, counts = plan.columns[part].copy(), plan.columns[part].copy(), plan.counts[part]
        packed = np.full((len(counts), 4), COUNTED)
        packed[:, 0], packed[:, 1] = counts.cumsum() - counts, into[:, UNIT] * into[:, N_UNITS]
        into[:, TARGET : TARGET + 4] = out_of[:, SOURCE : SOURCE + 4] = packed
        room = int(counts.sum())
        from_source = BlockPlan(into, plan.indices, (plan.source_size, room))
        stages.append((from_source, BlockPlan(out_of, plan.indices, (room, plan.target_size))))
    return stages


def send_tables(plans: Sequence[BlockPlan], device: torch.device) -> None:
    """Send what copies on the device look up; once, and for a kernel in one piece."""
    if triton_works(device):
        send_to_kernel(plans, device)
        return
    for plan in plans:
        numbers_of(plan, device)


def send_to_kernel(plans: Sequence[BlockPlan], device: torch.device) -> None:
    """``send_tables`` for the kernel."""
    lacking = [plan for plan in plans if device not in plan.sent]
    if lacking:
        made = DeviceTables.of(lacking, device, PROGRAM)
        for plan, tables in zip(lacking, made, strict=True):
            plan.sent[device] = tables


# --- the kernel ---


@jit
def _locate(blocks, indices, base, row, unit_number, rest, unit, used):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Entries of an array: start + row * row length + unit number * unit + rest."""
    start = tl.load(blocks + base)
    row_length = tl.load(blocks + base + 1)
    rows = indices + tl.load(blocks + base + 2)
    units = indices + tl.load(blocks + base + 3)
    row = tl.load(rows + row, mask=used, other=0)
    unit_number = tl.load(units + unit_number, mask=used, other=0)
    return start + row * row_length + unit_number * unit + rest


@jit
def copy_programs(  # type: ignore[no-untyped-def]  # noqa: ANN201
    programs, blocks, indices, source, target,  # noqa: ANN001
    from_grid: tl.constexpr, to_grid: tl.constexpr, step: tl.constexpr,
):
    program = tl.program_id(0)
    base = tl.load(programs + program * 3) * 10
    first = tl.load(programs + program * 3 + 1)
    last = tl.load(programs + program * 3 + 2)
    unit = tl.load(blocks + base)
    n_units = tl.load(blocks + base + 1)
    offset = first
    while offset < last:  # Triton 3.6 cannot interpret a range of numbers that were loaded
        entry = offset + tl.arange(0, step)
        used = entry < last
        number = entry // unit
        row = number // n_units
        rest = entry - number * unit
        unit_number = number - row * n_units
        here = _locate(blocks, indices, base + from_grid, row, unit_number, rest, unit, used)
        there = _locate(blocks, indices, base + to_grid, row, unit_number, rest, unit, used)
        tl.store(target + there, tl.load(source + here, mask=used), mask=used)
        offset += step


def launch(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool, device: torch.device) -> None:
    """Copy all blocks from ``source`` to ``target`` (back if ``reverse``) on the current stream.

    Args:
        plan: the blocks; its tables are sent to the device by the first launch.
        source, target: flat arrays of one dtype, each on the device or in page-locked host memory.
        reverse: copy from ``target`` to ``source``.
        device: where the kernel runs.
    """
    send_to_kernel([plan], device)
    tables = plan.sent[device]
    words: Any = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    arrays, grids = [source.view(words), target.view(words)], [SOURCE, TARGET]
    if reverse:
        arrays.reverse()
        grids.reverse()
    grid = (tables.programs.shape[0],)
    used_now(tables.programs)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton's interpreter
        copy_programs[grid](tables.programs, tables.blocks, tables.indices, *arrays, *grids, STEP)


# --- which way ---


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the kernel copies right on a device; False, with one warning, where Triton is missing or
    fails.
    """
    plan, host, out = _probe(NARROW, device, 4, "off")
    source = host.to(device)
    try:
        launch(plan, source, out, False, device)
        wrong = "" if torch.equal(out.cpu(), host.view(4, 4)[::2, ::2].flatten()) else "its copy is wrong"
    except Exception as error:
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if wrong:
        logger.warning("copies on %s go through torch, which is slower: no Triton (%s)", device, wrong)
    return not wrong


def compared_ways(device: torch.device, to_host: bool, unit: int) -> tuple[float, float]:
    """Seconds of a copy by a kernel that reads or writes page-locked memory directly, and of a staged one, of
    (PROBED / 2)² units of float32; for the arguments see ``zero_copy_is_faster``. Raises an error: a way
    fails."""
    plan, host, out = _probe(unit, device, PROBED, "on")
    direct = _seconds(lambda: launch(plan, host, out, to_host, device), device)
    return direct, _seconds(lambda: copy_staged(plan, host, out, to_host), device)


@functools.cache
def zero_copy_is_faster(device: torch.device, to_host: bool, unit: int) -> bool:
    """Whether kernels that read or write page-locked memory directly beat staging and a copy, measured;
    False if they fail.

    Args:
        device: a CUDA device.
        to_host: the direction.
        unit: ``NARROW`` or ``WIDE``.
    """
    if not triton_works(device):
        return False
    try:
        direct, staged = compared_ways(device, to_host, unit)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        logger.warning("host transfers are staged: zero-copy failed (%s: %s)", type(error).__name__, reason)
        return False
    way = f"{'to' if to_host else 'from'} host memory in units of {unit}"
    logger.info("transfers %s: direct %.2f ms, staged %.2f ms", way, 1e3 * direct, 1e3 * staged)
    return direct < staged


def _probe(unit: int, device: torch.device, size: int, pin: Switch) -> tuple[BlockPlan, Tensor, Tensor]:
    """Every other row and unit of a host array [size, size, unit]; the array; room on the device."""
    kept = np.arange(0, size, 2)
    plan = part_of_matrix((size, size, unit), kept, kept)
    host = host_zeros(plan.source_size, torch.float32, pin)
    torch.arange(len(host), out=host)
    return plan, host, torch.empty(plan.entries, device=device)


def _unit(plan: BlockPlan) -> int:
    """``NARROW`` or ``WIDE``, whichever is nearer to the blocks' units."""
    return WIDE if plan.entries > 3 * (plan.counts // plan.columns[:, UNIT]).sum() else NARROW


def _seconds(transfer: Callable[[], None], device: torch.device) -> float:
    """Median after a run that is not counted."""
    seconds = []
    for _ in range(_REPETITIONS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        transfer()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])
