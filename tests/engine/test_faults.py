"""Planned faults kill exactly where they say, and nothing happens without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from offload_sparse.engine.faults import VARIABLE, Fault, fault_point, planned_faults


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that a process would have sent itself."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    for name in ("RANK", "TORCHELASTIC_RESTART_COUNT", VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return sent


def test_without_the_variable_nothing_happens(killed: list[int]) -> None:
    fault_point("scatter", 37)
    assert killed == []


@pytest.mark.parametrize(
    ("rank", "phase", "step", "restart", "dies"),
    [
        ("1", "scatter", 37, "0", True),
        ("1", "scatter", 50, "0", True),
        ("1", "scatter", 36, "0", False),
        ("0", "scatter", 37, "0", False),
        ("1", "gather", 37, "0", False),
        ("1", "scatter", 37, "1", False),
    ],
)
def test_it_kills_where_and_when_it_is_told_to(
    rank: str,
    phase: str,
    step: int,
    restart: str,
    dies: bool,
    killed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank, in the phase, from the step on, and in the first attempt only."""
    monkeypatch.setenv(VARIABLE, "kill:rank=1:step=37:phase=scatter")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
    fault_point(phase, step)
    assert killed == ([signal.SIGKILL] if dies else [])


def test_a_rank_that_is_to_hang_is_stopped_instead(
    killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "hang:step=3:phase=step")
    fault_point("step", 3)
    assert killed == [signal.SIGSTOP]


def test_faults_can_be_listed() -> None:
    faults = planned_faults("kill:phase=step:step=3,kill:rank=1:phase=gather:restart=2")
    assert faults == (Fault("step", 3), Fault("gather", rank=1, restart=2))


@pytest.mark.parametrize(
    "text",
    ["kill", "kill:phase=nowhere", "stall:phase=step", "kill:phase=step:step=x", "kill:phase=step:at=3"],
)
def test_what_cannot_be_understood_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="kill:rank=1:step=37:phase=scatter"):
        planned_faults(text)
