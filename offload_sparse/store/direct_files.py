"""Transfers between files and memory that pass by the page cache, window by window.

    file      | window 0      | window 1      | window 2      |        pieces of the blocks of a plan, by the
    rows            k   k           k     kk        k                  window in which their rows begin
                    |___|           |_____|         |
    gather     read the span of a window's rows -> buffer -> narrow array,   the next span read meanwhile
    scatter    read the span -> buffer <- narrow array, write the span back

Each byte of a span is read once for all blocks that lie in it. Spans begin and end on multiples of ``ALIGN``
bytes, as direct input and output demands; files are as long as that.

What reads and writes is DeepSpeed's DeepNVMe, where it is there. Its native part is built by DeepSpeed when
it is first wanted, which takes minutes; a build that was killed leaves a lock behind on which the next one
would wait for ever. It is therefore built in a process of its own, with a limit on its time. Nothing of
DeepSpeed is imported before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import N_ROWS, ROWS, SOURCE, TARGET, BlockPlan, Numbers
from offload_sparse.store.copy.copy import copy_blocks

THREADS = 4
"""Threads that share a read or a write."""

ALIGN = 4096 * THREADS
"""Bytes of which files, offsets and lengths are multiples."""

WINDOW = 64 << 20
"""Bytes of a file in which the rows of one window begin."""

BUILD_SECONDS = 1200
"""Seconds after which a build is given up."""

BLOCK_BYTES, QUEUE_DEPTH = 1 << 20, 32

logger = logging.getLogger(__name__)


class Handle(Protocol):
    """What is used of DeepNVMe's ``aio_handle``."""

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int) -> int:
        """Begin to read; not 0 when it cannot be begun."""

    def async_pwrite(self, buffer: Tensor, filename: str, file_offset: int) -> int:
        """Begin to write; not 0 when it cannot be begun."""

    def wait(self) -> int:
        """Wait for all that was begun; how many reads and writes have ended."""

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """A page-locked flat tensor [num_elem] of the example's type."""

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Give one back."""


@dataclass(frozen=True)
class Window:
    """Blocks that lie near each other in a file: the half-open range of the array's entries that is read, in
    multiples of ``ALIGN`` bytes, and the blocks, with entry ``first`` of the array as entry 0 of their
    source."""

    first: int
    last: int
    plan: BlockPlan


class DirectFiles:
    """The arrays of a store, in a file of one type per kind, read and written by ``handle`` in windows."""

    def __init__(self, handle: Handle, paths: Mapping[str, Path], dtype: torch.dtype) -> None:
        self._handle, self._paths, self._dtype = handle, paths, dtype
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()  # a round's entries may come while those of another go back

    def copy(self, plan: BlockPlan, pairs: Sequence[tuple[str, Tensor]], reverse: bool = False) -> None:
        """``copy_blocks`` of (kind, flat array) pairs with files as the sources. Raises OSError: a file
        cannot be read or written."""
        item = self._dtype.itemsize
        found = windows(plan, WINDOW // item, ALIGN // item)
        if not found or not pairs:
            return
        with self._lock:
            self._hold(max(2, len(pairs)), max(window.last - window.first for window in found))
            if reverse:
                self._write(found, pairs)
            else:
                self._read([(window, kind, array) for window in found for kind, array in pairs])

    def _read(self, jobs: Sequence[tuple[Window, str, Tensor]]) -> None:
        begun = self._begin_read(jobs[0][0], jobs[0][1], 0)
        for number, (window, kind, array) in enumerate(jobs):
            self._finish(kind, 1)
            buffer = begun
            if number + 1 < len(jobs):
                begun = self._begin_read(jobs[number + 1][0], jobs[number + 1][1], (number + 1) % 2)
            copy_blocks(window.plan, [(buffer, array)])

    def _write(self, found: Sequence[Window], pairs: Sequence[tuple[str, Tensor]]) -> None:
        """Window by window: spans of neighbours may share their last and first bytes."""
        for window in found:
            buffers = [self._begin_read(window, kind, number) for number, (kind, _) in enumerate(pairs)]
            self._finish(pairs[0][0], len(pairs))
            arrays = [array for _, array in pairs]
            copy_blocks(window.plan, list(zip(buffers, arrays, strict=True)), reverse=True)
            offset = window.first * self._dtype.itemsize
            for buffer, (kind, _) in zip(buffers, pairs, strict=True):
                self._begun(self._handle.async_pwrite(buffer, str(self._paths[kind]), offset), kind)
            self._finish(pairs[0][0], len(pairs))

    def _begin_read(self, window: Window, kind: str, number: int) -> Tensor:
        buffer = self._buffers[number][: window.last - window.first]
        offset = window.first * self._dtype.itemsize
        self._begun(self._handle.async_pread(buffer, str(self._paths[kind]), offset), kind)
        return buffer

    def _begun(self, code: int, kind: str) -> None:
        if code:
            raise OSError(f"{self._paths[kind]} cannot be read or written past the page cache")

    def _finish(self, kind: str, expected: int) -> None:
        if self._handle.wait() != expected:
            raise OSError(f"a transfer of {self._paths[kind]} has failed")

    def _hold(self, count: int, entries: int) -> None:
        """Have ``count`` buffers of at least ``entries`` entries."""
        if len(self._buffers) < count or self._buffers[0].numel() < entries:
            example = torch.empty(0, dtype=self._dtype)
            while self._buffers:
                self._handle.free_cpu_locked_tensor(self._buffers.pop())
            self._buffers = [self._handle.new_cpu_locked_tensor(entries, example) for _ in range(count)]


def windows(plan: BlockPlan, size: int, align: int) -> list[Window]:
    """The blocks of ``plan``, cut at rows, by the part of the source, of ``size`` entries, in which their
    rows begin; a row that is longer makes its window longer. Every window's ends are multiples of ``align``.
    """
    pieces: dict[int, list[Numbers]] = {}
    for columns, block in zip(plan.columns, plan.blocks, strict=True):
        grid = block.source
        rows = plan.numbers(grid.rows, block.n_rows)
        numbers = (grid.start + rows * grid.row_length) // size
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        for first, last in pairwise([0, *cuts.tolist(), block.n_rows]):
            piece = columns.copy()
            piece[[SOURCE + ROWS, TARGET + ROWS]] += first
            piece[N_ROWS] = last - first
            pieces.setdefault(int(numbers[first]), []).append(piece)
    return [_window(plan, np.stack(pieces[number]), align) for number in sorted(pieces)]


def _window(plan: BlockPlan, columns: Numbers, align: int) -> Window:
    firsts, ends = BlockPlan(columns, plan.indices, (plan.source_size, plan.target_size)).ends(SOURCE)
    first, last = int(firsts.min()) // align * align, -(-int(ends.max()) // align) * align
    columns[:, SOURCE] -= first
    return Window(first, last, BlockPlan(columns, plan.indices, (last - first, plan.target_size)))


# --- DeepNVMe ---


def open_handle(folder: Path) -> Handle | None:
    """DeepNVMe's handle for files in ``folder``; None, with one warning that says what to do, without it."""
    reason = _missing() or _build()
    handle = None if reason else _load()
    if handle is not None:
        reason = _refusal(handle, folder)
    if reason:
        logger.warning("store.tier nvme works as file, through the page cache: %s", reason)
        return None
    return handle


def _missing() -> str:
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (pip install 'offload-sparse[deepspeed]')"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "libaio is missing (install the package libaio-dev)"
    return ""


def _build() -> str:
    """Why DeepNVMe cannot be built; empty when it is there."""
    logger.info("DeepNVMe is being loaded; when it is wanted for the first time, it is built (minutes)")
    script = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
    command = [sys.executable, "-c", script]
    try:
        built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
        return f"its build took over {BUILD_SECONDS} s; if an earlier one was killed, delete {folder}"
    if built.returncode:
        return f"its build failed ({(built.stderr.strip().splitlines() or ['no message'])[-1]})"
    return ""


def _load() -> Handle:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    library = AsyncIOBuilder().load(verbose=False)
    return library.aio_handle(
        block_size=BLOCK_BYTES,
        queue_depth=QUEUE_DEPTH,
        single_submit=False,
        overlap_events=True,
        intra_op_parallelism=THREADS,
    )


def _refusal(handle: Handle, folder: Path) -> str:
    """Why files in ``folder`` cannot be read past the page cache; empty when they can."""
    path = folder / "direct.tmp"
    try:
        path.write_bytes(b"\1" * ALIGN)
        buffer = handle.new_cpu_locked_tensor(ALIGN, torch.empty(0, dtype=torch.uint8))
        if handle.async_pread(buffer, str(path), 0) == 0 and handle.wait() == 1 and bool((buffer == 1).all()):
            return ""
        return f"the file system of {folder} does not take direct reads"
    finally:
        path.unlink(missing_ok=True)
