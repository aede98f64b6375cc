"""What a session was busy with, and when."""

from __future__ import annotations

import pytest
import torch

from offload_sparse.engine import timeline as timeline_module
from offload_sparse.engine.timeline import Timeline


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    """A timeline whose clock is advanced by one second each time it is read."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(timeline_module.time, "perf_counter", lambda: float(next(ticks)))
    return Timeline(torch.device("cpu"))


def one_round(timeline: Timeline, steps: int) -> None:
    with timeline.exchanging(), timeline.span("gather"):
        pass
    for _ in range(steps):
        with timeline.stepping():
            pass
    timeline.end_round()


def test_means_are_per_round_and_count_everything_once(timeline: Timeline) -> None:
    for steps in (2, 4):
        one_round(timeline, steps)
    # Each reading of the clock takes a second: a gather 1, what surrounds it 3, a step 1.
    assert timeline.means() == {
        "gather_seconds": 1.0,
        "carry_seconds": 0.0,
        "scatter_seconds": 0.0,
        "compute_seconds": 3.0,
        "exchange_seconds": 3.0,
    }
    assert timeline.means() == {}, "no round has ended since"
    one_round(timeline, 1)
    assert timeline.means()["compute_seconds"] == 1.0


def test_the_last_rounds_begin_at_zero_and_are_complete(timeline: Timeline) -> None:
    for _ in range(5):
        one_round(timeline, 2)
    with timeline.span("gather"):
        pass  # of a round that is not over
    spans = timeline.last_rounds()
    assert [lane for lane, _, _ in spans] == ["gather", "compute"] * timeline_module.KEPT_ROUNDS
    assert min(start for _, start, _ in spans) == 0
    assert all(start < end for _, start, end in spans)
    ends = [end for lane, _, end in spans if lane == "compute"]
    assert ends == sorted(ends)


def test_without_a_round_there_is_nothing_to_tell(timeline: Timeline) -> None:
    assert timeline.means() == {}
    assert timeline.last_rounds() == []
