"""Forked processes are spoken to as ``subprocess.Popen`` is."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from tests.support import fork_server


def test_a_signal_to_a_process_that_has_ended_has_no_effect(tmp_path: Path) -> None:
    """One ends between a look and the signal; its number is nobody's then."""
    with (tmp_path / "log").open("w") as log:
        process = fork_server.shared().start("builtins:len", ["a", "b"], os.environ, log.fileno())
        while not process.ended():
            select.select([], [], [], 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == 2, (tmp_path / "log").read_text()
