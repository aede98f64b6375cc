"""Forked processes are spoken to as ``subprocess.Popen`` is."""

from __future__ import annotations

import atexit
import os
import select
import signal
from pathlib import Path

import pytest

from tests.support import fork_server
from tests.support.fork_server import ForkServer


def test_a_signal_to_a_process_that_has_ended_has_no_effect(tmp_path: Path) -> None:
    """One ends between a look and the signal; its number is nobody's then."""
    with (tmp_path / "log").open("w") as log:
        process = fork_server.shared().start("builtins:len", ["a", "b"], os.environ, log.fileno())
        while not process.ended():
            select.select([], [], [], 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == 2, (tmp_path / "log").read_text()


def registers(arguments: list[str]) -> None:
    atexit.register(print, *arguments)


@pytest.mark.parametrize(("unwinds", "said"), [(True, "at the end\n"), (False, "")])
def test_a_process_may_end_as_an_interpreter_does(unwinds: bool, said: str) -> None:
    server = fork_server.shared()
    done = server.run(f"{__name__}:registers", ["at", "the", "end"], os.environ, 60, unwinds)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_a_test_run_has_one_server_of_a_kind() -> None:
    """Whichever of its processes asks; here two objects stand for two of them."""
    parents = set()
    for server in (fork_server.shared(), ForkServer(fork_server.MODULES, os.environ[fork_server.FOLDER])):
        parents.add(server.run(f"{__name__}:tells_of_the_server", [], os.environ, 60).stdout)
    assert len(parents) == 1


def tells_of_the_server(_: list[str]) -> None:
    """Its number: the parent of the keeper of this process."""
    keeper = Path(f"/proc/{os.getppid()}/stat").read_text()
    print(keeper.rpartition(")")[2].split()[1])
