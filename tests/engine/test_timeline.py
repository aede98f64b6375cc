"""What a session was busy with, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from offload_sparse.engine import timeline as timeline_module
from offload_sparse.engine.config import RoundConfig, Sync
from offload_sparse.engine.timeline import Lane, Timeline
from offload_sparse.policy.config import PolicyConfig
from tests.support.sessions import batches, loss_of, make_session, small_net


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


class Event:
    """As CUDA's: what lies between two is float32, in milliseconds."""

    seconds = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, _stream: object) -> None:
        self.at = Event.seconds

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return float(torch.tensor(1000 * (other.at - self.at), dtype=torch.float32))


def test_transfers_are_as_long_after_days_as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timeline = Timeline(torch.device("cuda"))
    for days in range(3):
        Event.seconds = 86_400.0 * days
        with timeline.span("gather"):
            Event.seconds += 0.003
        timeline.end_round()
        assert timeline.means()["gather_seconds"] == pytest.approx(0.003)


class Nested(Timeline):
    """Knows which lanes had work within an exchange, and which had some outside."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.depth, self.within, self.outside = 0, set[Lane](), set[Lane]()

    @contextmanager
    def span(self, lane: Lane) -> Iterator[None]:
        (self.within if self.depth else self.outside).add(lane)
        with super().span(lane):
            yield

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        self.depth += 1
        with super().exchanging():
            yield
        self.depth -= 1


@pytest.mark.parametrize("sync", ["step", "round"])
def test_all_that_lies_between_two_rounds_counts_as_their_exchange(sync: Sync) -> None:
    """What ranks agree on at the end of a local round, and its way back to the store, too."""
    rounds = RoundConfig(k=2, sync=sync, transfer="auto" if sync == "step" else "full")
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), rounds)
    session.transfers.timeline = timeline = Nested()
    for batch in batches(7):
        session.step(loss_of(batch))
    assert timeline.within == {"gather", "carry", "scatter"}
    assert not timeline.outside
    assert {lane for lane, _, _ in timeline.last_rounds()} == {"gather", "carry", "compute", "scatter"}
