"""One folder, one job: a lock that lasts exactly as long as the processes that hold it.

    first rank     exclusive at the start ──▶ shared once all ranks are there
    other ranks                               shared
    another job    fails to get its exclusive one, whichever of these ranks is left
    who takes turns    waits for it

The kernel drops the lock (flock) of a process that ends, however it ends: a file that is left over locks
nothing, and the next start takes it. Within a process a folder can be locked more than once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from offload_sparse.store.files import make_folder

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@dataclass(eq=False)
class FolderLock(AbstractContextManager["FolderLock"]):
    """A lock that this process holds. A context manager: leaving it releases the lock."""

    path: Path
    descriptor: int
    made_folder: bool
    holders: int = 1

    def share(self) -> None:
        """Let the other ranks of the job hold it too. Raises ValueError: another job has come between."""
        _take(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, self.path)

    def release(self) -> None:
        """Let go; the file goes too unless another rank still holds it, and with it a folder that has nothing
        else and was made for it. Of a parent's lock, a forked child lets nothing go.
        """
        self.holders -= 1
        if self.holders or _held.get(self.path) is not self:
            return
        del _held[self.path]
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink(missing_ok=True)
            if self.made_folder:
                self.path.parent.rmdir()
        except OSError:
            logger.debug("%s stays: another rank holds it, or the folder has files", self.path)
        os.close(self.descriptor)

    def __exit__(self, *_: object) -> None:
        self.release()


_held: dict[Path, FolderLock] = {}


def lock_folder(
    folder: Path, shared: bool = False, name: str = LOCK_FILE, wait: bool = False
) -> FolderLock:
    """Lock ``folder``, which is made if it is not there, by its file ``name``; ``shared`` as a further rank
    of a job whose first rank has called ``share``; ``wait`` as one of several that take turns. Raises
    ValueError: another job holds it, on this host or another; or the folder cannot be written."""
    path = Path(os.path.realpath(folder / name))
    if (held := _held.get(path)) is not None:
        held.holders += 1
        return held
    made = not folder.exists()
    try:
        make_folder(folder)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        descriptor = _open(path, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{folder} cannot be written ({reason}); give another folder") from error
    if not shared:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    _held[path] = FolderLock(path, descriptor, made)
    return _held[path]


def _open(path: Path, kind: int) -> int:
    """A descriptor of the locked file ``path``, and of no file that was deleted just before."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, kind, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, kind: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise ValueError(
            f"{path.parent} is in use by {_owner(descriptor)}; wait for its end, or give another folder"
        ) from None
    except OSError as error:  # some network file systems know no locks
        logger.warning("%s cannot be locked (%s); start no second job on it", path.parent, error.strerror)


def _owner(descriptor: int) -> str:
    for _ in range(10):  # who has just taken it may not have written its name yet
        if text := os.pread(descriptor, 200, 0).decode(errors="replace"):
            return "".join(c for c in text if c.isprintable())
        time.sleep(0.02)
    return "another process"


def _forget() -> None:
    """A forked child (a worker that loads data) must not hold on when its parent is gone."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
