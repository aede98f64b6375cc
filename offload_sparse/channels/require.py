"""Mistakes of users, each a ValueError of one line: a condition that must hold, an error of a library."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ``message``, one line that says what to change, unless ``condition`` holds. Raises ValueError:
    the condition does not hold."""
    if not condition:
        raise ValueError(message)


class Explained:
    """Inside, an error (of ``kinds``) becomes a ValueError of one line: ``before``, what it says itself, and
    ``after``."""

    def __init__(
        self, before: str, after: str = "", kinds: tuple[type[Exception], ...] = (Exception,)
    ) -> None:
        self._before, self._after, self._kinds = before, after, kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._kinds):
            raise ValueError(f"{self._before}{in_one_line(error)}{self._after}") from error


def in_one_line(error: BaseException) -> str:
    """What an error says, at most 200 characters of it; its type where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
