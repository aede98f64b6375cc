"""Signals that ask a run to stop: noted once, obeyed when they are meant twice."""

from __future__ import annotations

import signal

import pytest

from offload_sparse.run import signals
from offload_sparse.run.signals import GRACE, SIGNALS, Interruption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_launcher_passes_on_once_more_is_one_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as noted:
        assert noted.signal_name == ""
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert noted.signal_name == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_later_on_ends_the_process_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # worker processes may ignore it
    try:
        with Interruption():
            signal.raise_signal(signal.SIGINT)
            now += GRACE + 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
