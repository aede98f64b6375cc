"""What follows from steps whose loss or gradient was not finite."""

from __future__ import annotations

import logging

from offload_sparse.engine.config import OnNonFinite

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""As many steps that are not finite, one after the other, are no bad luck with a batch; nor are more than
these that are one in a hundred.
"""

_CONSEQUENCES = {
    "skip": "the batch has been skipped",
    "rollback": "the run goes on from the end of the round before",
}


class NonFinite:
    """Counts the steps that were left out (``skipped``); ``mode`` is what one of them leads to, which the
    first rank says."""

    def __init__(self, mode: OnNonFinite, rank: int) -> None:
        self._mode, self._rank = mode, rank
        self.skipped, self._in_a_row = 0, 0
        self._faults: list[str] = []

    def restore(self, skipped: int) -> None:
        """Go on from a state in which so many steps had been left out."""
        self.skipped, self._in_a_row, self._faults = skipped, 0, []

    def seen(self, fault: str) -> None:
        """Note one more step: what was not finite in it, or ""."""
        self._in_a_row = self._in_a_row + 1 if fault else 0
        self.skipped += bool(fault)
        self._faults += [fault] if fault else []

    def rolls_back(self, steps_done: int) -> bool:
        """Whether the steps since the last call lead back to the end of the round before. Those that were not
        finite have moved nothing. Raises FloatingPointError: they end the run.
        """
        faults, self._faults = self._faults, []
        if not faults:
            return False
        if self._mode == "stop":
            raise FloatingPointError(faults[0])
        if self._in_a_row >= MOST_SKIPPED or self.skipped > max(MOST_SKIPPED, steps_done // 100):
            many = f"{self._in_a_row} in a row, {self.skipped} of {steps_done} steps"
            raise FloatingPointError(f"too many steps are not finite ({many}); the last one: {faults[-1]}")
        if self._rank == 0:
            for fault in faults:
                logger.warning("%s; %s", fault, _CONSEQUENCES[self._mode])
        return self._mode == "rollback"
