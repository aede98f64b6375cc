"""DeepSpeed's DeepNVMe, where it is there: reads and writes of files past the page cache.

Its native part is built by DeepSpeed when it is first wanted, which takes minutes; a build that was killed
leaves a lock behind on which the next one would wait for ever. It is therefore built in a process of its own,
with a limit on its time. Nothing of DeepSpeed is imported before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from offload_sparse.store.direct_files import ALIGN, THREADS, Handle

BUILD_SECONDS = 1200
"""Seconds after which a build is given up."""

BLOCK_BYTES, QUEUE_DEPTH = 1 << 20, 32

logger = logging.getLogger(__name__)


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
    command = [
        sys.executable,
        "-c",
        "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)",
    ]
    try:
        built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (
            f"its build did not end within {BUILD_SECONDS} s; if an earlier one was killed, delete "
            f"{_build_folder()}"
        )
    if built.returncode:
        return f"its build failed ({(built.stderr.strip().splitlines() or ['no message'])[-1]})"
    return ""


def _build_folder() -> str:
    return os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"


def _load() -> Handle:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle: Handle = (
        AsyncIOBuilder()
        .load(verbose=False)
        .aio_handle(
            block_size=BLOCK_BYTES,
            queue_depth=QUEUE_DEPTH,
            single_submit=False,
            overlap_events=True,
            intra_op_parallelism=THREADS,
        )
    )
    return handle


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
