"""Images that cannot be decoded: counted, named in a log, and replaced as long as they are few."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offload_sparse.workloads.data.order import mix

logger = logging.getLogger(__name__)

CORRUPT_LOG = "corrupt_images.log"
_LINE = re.compile(r"image (\d+) of split (.+) cannot be decoded")


class Corrupt(NamedTuple):
    """An image that cannot be decoded: its split, its row there, and the reason in one line."""

    split: str
    row: int
    reason: str


class CorruptImages:
    """Counts the images that this rank could not decode, each once, however often it is met, up to ``limit``.
    Workers send what they meet along with their batches, so the count is that of the whole rank.

    ``log`` gets a line for each, appended, so that ranks can share it, whose length then counts those of all
    of them; ``None`` warns through ``logging`` alone. What it names already, in a run that resumes, is not
    named again."""

    def __init__(self, limit: int, log: Path | None = None) -> None:
        self.limit = limit
        self.log = log
        self._seen: set[tuple[str, int]] = set()
        self._logged = _read(log)

    def __len__(self) -> int:
        return len(self._seen | _read(self.log))

    def add(self, found: Iterable[Corrupt]) -> None:
        """Count and log what is new in ``found``. Raises ValueError: that makes more than ``limit``; names
        the image and the log."""
        for image in found:
            key = repr(image.split), image.row
            if key in self._seen:
                continue
            self._seen.add(key)
            line = f"image {image.row} of split {image.split!r} cannot be decoded ({image.reason})"
            if key not in self._logged:
                self._write(line)
            if len(self._seen) > self.limit:
                where = f", all named in {self.log}" if self.log is not None else ""
                raise ValueError(
                    f"{line}: {len(self._seen)} such image(s){where}, and {self.limit} are allowed; remove "
                    "them, or set data.columns to a column of images"
                )
            logger.warning("%s; another image takes its place in training", line)

    def _write(self, line: str) -> None:
        if self.log is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _read(log: Path | None) -> set[tuple[str, int]]:
    """Splits, as the log writes them, and rows of the images that it names."""
    if log is None or not log.exists():
        return set()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (_LINE.match(line) for line in lines)
    return {(match[2], int(match[1])) for match in found if match}


def substitute(index: int, attempt: int, size: int) -> int:
    """The image of a split of ``size`` that stands in for a corrupt one, at the first attempt (0) or a later
    one: a function of its index alone, so that every rank and worker takes the same."""
    key = mix(mix(np.array([index], dtype=np.uint64)) ^ np.uint64(attempt + 1))
    return int(key[0] % np.uint64(size))
