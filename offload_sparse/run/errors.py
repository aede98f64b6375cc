"""Errors of a run."""

from __future__ import annotations

import errno
from typing import TypeGuard


class RunError(RuntimeError):
    """A run that cannot go on, whatever its configuration says: one line on every rank, exit code 1."""


def disk_fails(error: object) -> TypeGuard[OSError]:
    """Whether a file could not be written because of its disk, and not because of its name."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return isinstance(error, OSError) and error.errno in codes
