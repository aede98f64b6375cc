"""A check of a value that a user has given."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ``message``, one line that says what to change, unless ``condition`` holds. Raises ValueError:
    the condition does not hold."""
    if not condition:
        raise ValueError(message)
