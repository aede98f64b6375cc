"""Files that the processes of a test run share: the first one that needs them makes them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from tests.support import fork_server


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` has filled, in whichever process; no test changes what is in it."""
    folder = Path(os.environ[fork_server.FOLDER]) / name
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder
