"""Files that outlive a kill and a loss of power: after a crash a file is the old one or the new one, whole.

    name.tmp written ─ fsync ─ rename over name ─ fsync of the folder       then, and only then, it is there

Nothing else in the package renames a file to commit it. Modes follow the umask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
"""What a name ends with while its file is written; who finds one at a start may delete it."""


def write_file(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write a file into a folder that is there; when this returns, it lasts. ``content`` is bytes, text (as
    UTF-8), or blocks of bytes. Raises OSError: it cannot be written; ``path`` is as it was."""
    whole = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines([whole] if isinstance(whole, bytes) else whole)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall become ``path`` (a file, or a folder of files), for code that wants a name.

    What is there when the block ends is waited for and takes the place of ``path``, of a file at once, of a
    folder with a moment in which there is none. On an error it is removed, and ``path`` is as it was. Raises
    OSError: it cannot be written or renamed."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        sync(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """``mkdir -p`` that lasts, and a folder that a start has made that died before it could wait for it.
    Raises OSError: it cannot be made."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made or [path]:
        with suppress(PermissionError):  # of a folder that may be entered, but not read
            sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_folder(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, whichever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
