"""What a program asks of its disk, in order, so that a test can say what a loss of power would leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Disk:
    """Records every fsync and rename.

    Attributes:
        events: (``fsync`` or ``rename``, path) in order; of a rename the new name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path]] = []
        self._synced: dict[int, int] = {}
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self._record_fsync)
        monkeypatch.setattr(os, "replace", self._record_replace)
        monkeypatch.setattr(os, "rename", self._record_replace)

    def lasts(self, path: Path) -> bool:
        """Whether the bytes of a file, as they are, and its name would be there after a loss of power."""
        status = path.stat()
        named = max((i for i, event in enumerate(self.events) if event == ("rename", path)), default=-1)
        folder_synced = ("fsync", path.parent) in self.events[named + 1 :]
        return self._synced.get(status.st_ino) == status.st_size and folder_synced

    def _record_fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        self._synced[status.st_ino] = status.st_size
        self.events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def _record_replace(self, source: os.PathLike[str], target: os.PathLike[str]) -> None:
        assert Path(source).is_dir() or os.stat(source).st_ino in self._synced, f"{source} is not on the disk"
        self._replace(source, target)
        self.events.append(("rename", Path(target)))
