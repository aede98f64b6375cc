"""Errors of a run."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot go on, whatever its configuration says: one line on every rank, exit code 1."""
