"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        state: ``error`` if a run cannot work, ``warning`` if it is slower or can do less, ``ok`` otherwise.
        found: what is there.
        fix: what to do about it; empty for ``ok``.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.state != "ok"), f"{self.name}: a fix belongs to what is not ok"
