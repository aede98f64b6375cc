"""A disk that is watched: what a kill, or a loss of power, would leave of a folder at every call on it.

    seen before they happen    open to write, rename, remove, mkdir, rmdir, truncate, chmod, … (Python's audit
                               events), write (half of it done), fsync, pwrite, posix_fallocate
    not seen                   writes through memory maps and by compiled libraries: they are in the folder at
                               the next call

A kill leaves the folder as it is. A loss of power leaves of a file what its last fsync found, and of a folder
the names that its own last fsync found; of everything later it may leave any part.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Tree = dict[str, bytes | None]
"""Files with their content, and folders (None), by their path in the folder that is watched."""

_SECTOR = 512
_EVENTS = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"),
    *("os.symlink", "os.utime"),
}
_DESCRIPTOR_AT = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.chmod": 2}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Found = Callable[[str, "WatchedDisk"], None]
"""Receives the call that is about to be made; may ask the disk for its trees."""


class WatchedDisk:
    """Watches ``root`` in this process to its end; what is there now has reached the disk.

    Nothing is waited for any more: ``os.fsync`` only takes note.
    """

    def __init__(self, root: Path, found: Found) -> None:
        self.root = str(root.resolve())
        self._found = found
        self._lock, self._busy = threading.RLock(), False
        self._names: dict[int, dict[str, int]] = {}  # of folders, when they were last waited for
        self._content: dict[int, bytes] = {}  # of files, likewise
        self._held: dict[int, int] = {}  # descriptors, so that the number of a file is not given to another
        for folder, _, files in os.walk(self.root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                self._sync(self._hold(path))
        self._watch()

    # --- what would be left ---

    def as_it_is(self) -> Tree:
        """What a kill leaves."""
        return self._tree(self._now, self._whole)

    def after_power_loss(self, kind: str, seed: int = 0) -> Tree:
        """What a loss of power may leave: of everything that was not waited for ``nothing``, only the
        ``names``, or ``some`` of it, by names of a folder and sectors of a file.
        """
        draw = random.Random(seed)
        names = {"nothing": self._at_last, "names": self._now, "some": self._some(draw)}
        return self._tree(names[kind], self._torn(draw) if kind == "some" else self._at_last_content)

    def _tree(self, names: Callable[[int], dict[str, int]], content: Callable[[int], bytes]) -> Tree:
        tree: Tree = {}
        pending = [("", os.stat(self.root).st_ino)]
        while pending:
            prefix, folder = pending.pop()
            for name, inode in sorted(names(folder).items()):
                tree[prefix + name] = None if self._is_folder(inode) else content(inode)
                if self._is_folder(inode):
                    pending.append((f"{prefix}{name}/", inode))
        return tree

    def _now(self, folder: int) -> dict[str, int]:
        """Names in a folder that is there (a removed one has none), each held from now on. Another thread may
        rename meanwhile: what was read then never stood on the disk, and is read again.
        """
        path = f"/proc/self/fd/{self._held[folder]}"
        while os.fstat(self._held[folder]).st_nlink:
            names = os.listdir(path)
            with suppress(FileNotFoundError):
                found = {name: self._hold(f"{path}/{name}") for name in names}
                if sorted(os.listdir(path)) == sorted(names):
                    return found
        return {}

    def _at_last(self, folder: int) -> dict[str, int]:
        return self._names.get(folder, {})

    def _some(self, draw: random.Random) -> Callable[[int], dict[str, int]]:
        return lambda folder: (self._now if draw.random() < 0.5 else self._at_last)(folder)

    def _whole(self, inode: int) -> bytes:
        return Path(f"/proc/self/fd/{self._held[inode]}").read_bytes()

    def _at_last_content(self, inode: int) -> bytes:
        return self._content.get(inode, b"")

    def _torn(self, draw: random.Random) -> Callable[[int], bytes]:
        def content(inode: int) -> bytes:
            old, new = self._at_last_content(inode), self._whole(inode)
            length = draw.choice([len(old), len(new)])
            sides = (old.ljust(length, b"\0"), new.ljust(length, b"\0"))
            parts = [draw.choice(sides)[at : at + _SECTOR] for at in range(0, length, _SECTOR)]
            return b"".join(parts)[:length]

        return content

    # --- watching ---

    def _hold(self, path: str, follow: int = os.O_NOFOLLOW) -> int:
        """The number of what ``path`` leads to, opened first: the name may be another's a moment later."""
        descriptor = os.open(path, os.O_PATH | follow)
        inode = os.fstat(descriptor).st_ino
        if self._held.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode

    def _sync(self, inode: int) -> None:
        if self._is_folder(inode):
            self._names[inode] = self._now(inode)
        else:
            self._content[inode] = self._whole(inode)

    def _is_folder(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._held[inode]).st_mode)

    def _watch(self) -> None:
        opening = io.open
        sys.addaudithook(self._heard)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
            if set(mode) <= set("rbt") or isinstance(file, int):
                return opening(file, mode, buffering, *text, **more)
            raw = _Watched(file, mode.replace("b", "").replace("t", ""), opener=more.pop("opener", None))
            raw.disk = self
            binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, *text, **more)

        builtins.open = io.open = opened
        os.fsync = self._fsync  # type: ignore[assignment]
        for name in ("pwrite", "posix_fallocate"):
            setattr(os, name, self._told(name, getattr(os, name)))

    def _told(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(descriptor: int, *more: Any) -> Any:
            self.point(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return call(descriptor, *more)

        return told

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        link = f"/proc/self/fd/{number}"
        path = os.readlink(link)
        self.point("fsync", path)
        with self._alone():
            if self._inside(path):
                self._sync(self._hold(link, follow=0))

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or (event == "open" and not (arguments[2] or 0) & _WRITING):
            return
        path, at = arguments[0], _DESCRIPTOR_AT.get(event)
        if not isinstance(path, str | bytes | os.PathLike):
            return
        folder = arguments[at] if at is not None and len(arguments) > at else -1
        near = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        self.point(event.removeprefix("os."), os.path.abspath(os.path.join(near, os.fsdecode(path))))

    def point(self, call: str, path: str) -> None:
        """A call on ``path`` is about to be made."""
        if not self._inside(path):
            return
        with self._alone() as first:
            if first:
                self._found(f"{call} {os.path.relpath(path, self.root)}", self)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Inside, no other thread gets beyond a call, and own calls are no points."""
        with self._lock:
            before, self._busy = self._busy, True
            try:
                yield not before
            finally:
                self._busy = before

    def _inside(self, path: str) -> bool:
        return (path + os.sep).startswith(self.root + os.sep)


class _Watched(io.FileIO):
    disk: WatchedDisk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self.disk.point("write", str(self.name))
        done = super().write(view[:half]) if half else 0
        self.disk.point("write the rest of", str(self.name))
        return (done or 0) + (super().write(view[half:]) or 0)
