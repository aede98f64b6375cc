"""The checkpoints of a run on disk: each complete or not there.

    checkpoints/
      step_00000400/         rank_0.safetensors … manifest.json
      step_00000450.tmp/     being written, or left by a run that died; never read
      latest                 name of the newest complete checkpoint
      best                   name of the one with the best validation accuracy

A checkpoint comes into being by a rename, after its files and its folder have reached the disk.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from offload_sparse.run.manifest import MANIFEST_FILE

CHECKPOINT_FOLDER = "checkpoints"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"step_\d{8,}\.(tmp|old)")


class CheckpointFolder:
    """The folder ``checkpoints`` of a run; only rank 0 calls what changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of_step(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is or would be."""
        return self.path / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is written before it is complete."""
        return self.path / f"step_{step:08d}.tmp"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        try:
            names = [entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [(int(match[1]), name) for name in names if (match := re.fullmatch(_NAME, name))]
        return [self.path / name for _, name in sorted(found, reverse=True)]

    def prepare(self, step: int) -> None:
        """Make an empty folder to write into."""
        partial = self.partial(step)
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def commit(self, step: int, manifest: str) -> None:
        """Turn what was written for ``step`` into a checkpoint."""
        partial, final = self.partial(step), self.of_step(step)
        with (partial / MANIFEST_FILE).open("w", encoding="utf-8") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        if os.path.lexists(final):  # the same step once more, after a rollback or on other ranks
            discard(final)
        os.rename(partial, final)
        sync_folder(self.path)
        self.point(LATEST, step)

    def point(self, name: str, step: int) -> None:
        """Let the pointer ``name`` name the checkpoint of ``step``."""
        temporary = self.path / (name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self.of_step(step).name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)
        sync_folder(self.path)

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that the pointer names; None where it names none."""
        try:
            text = (self.path / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.path / text if re.fullmatch(_NAME, text) else None

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints and the best one."""
        for folder in self.checkpoints()[keep:]:
            if folder != self.pointed(BEST):
                discard(folder)

    def clean(self) -> None:
        """Remove what runs that died have left half-written."""
        if self.path.is_dir():
            for entry in list(self.path.iterdir()):
                if re.fullmatch(_PARTIAL, entry.name) and entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed does not look like a checkpoint."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
