"""When a session gathers, computes and scatters.

    gather    what the device lacks, from the store            (thread of the transfers, if they overlap)
    carry     what two rounds share, from pair to pair
    compute   the steps of a round, with the reading of batches between them
    scatter   what was evicted, back to the store              (thread of the transfers, if they overlap)

On a CUDA device marks are events on the stream that does the work, so that nothing waits for them; on a CPU
they are the clock. The CUDA branch has not been run on a GPU yet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Lane = Literal["gather", "carry", "compute", "scatter"]
_Mark = float | torch.cuda.Event

KEPT_ROUNDS = 3
_MOST_SPANS = 256


class Timeline:
    """Spans of work and what they add up to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin = self._now()
        self._round = 0
        self._computing: tuple[int, _Mark] | None = None
        # Lane, the round in which the work began, its begin and end.
        self._pending: deque[tuple[Lane, int, _Mark, _Mark]] = deque(maxlen=_MOST_SPANS)
        # The same, begin and end in seconds since the session was made.
        self._spans: deque[tuple[Lane, int, float, float]] = deque(maxlen=_MOST_SPANS)
        self._sums = dict.fromkeys(("gather", "carry", "scatter", "compute", "exchange"), 0.0)
        self._rounds_told = 0

    @contextmanager
    def span(self, lane: Lane) -> Iterator[None]:
        """Work of ``lane`` in this thread, on its current stream."""
        round, start = self._round, self._now()
        yield
        self._pending.append((lane, round, start, self._now()))

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A step, or the wait for the device behind the steps of a round."""
        if self._computing is None:
            self._computing = self._round, self._now()
        start = time.perf_counter()
        yield
        self._sums["compute"] += time.perf_counter() - start

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """The time between two rounds in which no step can run."""
        start = time.perf_counter()
        yield
        self._sums["exchange"] += time.perf_counter() - start

    def end_round(self) -> None:
        """The last step of a round is done."""
        if self._computing is not None:
            self._pending.append(("compute", *self._computing, self._now()))
        self._computing = None
        self._round += 1

    def means(self) -> dict[str, float]:
        """Seconds per round of each kind since the last call, as ``<kind>_seconds``; empty within a round.

        ``exchange`` is the time in which the steps stood still for the other three: what is left of these is
        overlap."""
        rounds = self._round - self._rounds_told
        if rounds == 0:
            return {}
        self._resolve()
        self._rounds_told = self._round
        means = {f"{kind}_seconds": total / rounds for kind, total in self._sums.items()}
        self._sums = dict.fromkeys(self._sums, 0.0)
        return means

    def last_rounds(self) -> list[tuple[str, float, float]]:
        """(lane, start, end) of the last ``KEPT_ROUNDS`` rounds that are complete, in seconds since the first
        of them began."""
        self._resolve()
        first = max(0, self._round - KEPT_ROUNDS)
        spans = [(lane, a, b) for lane, number, a, b in self._spans if first <= number < self._round]
        origin = min((start for _, start, _ in spans), default=0.0)
        return [(lane, round(start - origin, 6), round(end - origin, 6)) for lane, start, end in spans]

    def _resolve(self) -> None:
        """Read the marks of the work that is done."""
        for _ in range(len(self._pending)):
            lane, number, start, end = self._pending.popleft()
            if isinstance(end, torch.cuda.Event) and not end.query():
                self._pending.append((lane, number, start, end))
                continue
            begun, taken = _between(self._origin, start), _between(start, end)
            self._spans.append((lane, number, begun, begun + taken))
            if lane != "compute":
                self._sums[lane] += taken

    def _now(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(first: _Mark, second: _Mark) -> float:
    """Seconds; of events in float32, so that hours after another one its milliseconds are rounded."""
    if isinstance(first, float):
        assert isinstance(second, float)
        return second - first
    assert isinstance(second, torch.cuda.Event)
    return first.elapsed_time(second) / 1000
