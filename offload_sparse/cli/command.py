"""A command as a process: what it raises becomes one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from offload_sparse.run.errors import RunError

TRACEBACK_VARIABLE = "OFFLOAD_SPARSE_TRACEBACK"

_FILE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; bad input becomes one line on stderr and exit code 2.

    Bad input is a ``ValueError``, or a file that is missing or cannot be used. Only rank 0 prints, so that a
    launch of several processes shows the line once; with ``OFFLOAD_SPARSE_TRACEBACK=1`` after its traceback.

    A run that diverged (``FloatingPointError``) is told in the same way, with exit code 1; one that failed
    (``RunError``) by every rank, since the others may not live to tell.

    Returns:
        The command's exit code, 0 where it returns None.
    """
    try:
        return command() or 0
    except (ValueError, FloatingPointError, RunError, *_FILE_ERRORS) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RunError):
            if os.environ.get(TRACEBACK_VARIABLE) == "1":
                traceback.print_exc()
            line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _one_line(error))
            print(f"offload-sparse: error: {line}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | RunError) else 2


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if _raised_here(error) else f"{text} (set {TRACEBACK_VARIABLE}=1 to see where it was raised)"


def _raised_here(error: Exception) -> bool:
    """Whether the package itself raised the error, and not a library that it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("offload_sparse")
