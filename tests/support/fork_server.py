"""Processes that begin with everything imported: a server imports once, then forks one for every request.

    server (imports done, one thread) ──fork──▶ keeper ──fork──▶ the process asked for
                                                  │ tells how it ended; kills it when the client is gone

Run as a script (``python fork_server.py SOCKET MODULE:FUNCTION ARGUMENT …``) this file is a client that
stands for the process: same environment, same output, same end, even by a signal. A launcher that starts
ranks can so start them in milliseconds instead of the seconds that importing torch takes. The client imports
nothing beyond Python's own library.

``shared`` is the one server of a test process.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

MODULES = (
    "tests.run.killed_run",
    "tests.support.ranks",
    "offload_sparse.methods.sparse_offload",
    "accelerate",
    "accelerate.commands.launch",
    "torch._dynamo",
    "tests.support.reader",
)
"""What a command imports, and a launcher; last, what reads back the exports of all that is forked."""

_POLL_SECONDS = 0.02
_START_SECONDS = 300.0
_END_SECONDS = 30.0


class ForkServer:
    """A server of this process, ready once entered; ends when left.

    Args:
        modules: what it imports before it serves. None of them may start a thread.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = list(modules)
        self._folder = tempfile.TemporaryDirectory(prefix="fork")
        self.address = str(Path(self._folder.name) / "socket")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkServer:
        command = [sys.executable, "-m", "tests.support.fork_server", "--serve", self.address]
        pipe = subprocess.PIPE  # closed with this process, however it ends
        self._process = subprocess.Popen([*command, *self._modules], stdin=pipe, stdout=pipe)
        assert self._process.stdout is not None
        ready = _readable(self._process.stdout, _START_SECONDS)
        if not ready or self._process.stdout.readline() != b"ready\n":
            self.__exit__(None, None, None)
            raise RuntimeError("the server of processes did not start; its messages are above")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def run(
        self, target: str, arguments: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """A process from its beginning to its end, as ``subprocess.run`` has them.

        Raises:
            TimeoutError: it has not ended in time; it is killed.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = self.start(target, arguments, environment, out.fileno(), err.fileno()).wait(seconds)
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([target, *arguments], code, out.read(), err.read())

    def start(
        self,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        errors: int | None = None,
    ) -> Forked:
        """Begin a process.

        Args:
            target: ``module:function``; called with ``arguments``, returns an exit code or None.
            environment: all of its variables.
            output: file descriptor that becomes its stdout, and its stderr unless ``errors`` is given.
        """
        outputs = output, output if errors is None else errors
        return Forked(self.address, target, arguments, environment, outputs)


def _readable(file: Any, seconds: float | None) -> bool:
    """Whether there is something to be read in time; of any descriptor, which ``select`` has not room for."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


@cache
def shared() -> ForkServer:
    """The server of this process with ``MODULES``, started when it is first asked for."""
    server = ForkServer(MODULES).__enter__()
    atexit.register(server.__exit__, None, None, None)
    return server


class Forked:
    """A process that was asked for. It dies with the connection to it.

    Attributes:
        pid: of the process itself.
    """

    def __init__(
        self,
        address: str,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        outputs: tuple[int, int],
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        request = {"target": target, "argv": list(arguments), "env": dict(environment), "cwd": os.getcwd()}
        payload = json.dumps(request).encode()
        socket.send_fds(self._connection, [array.array("q", [len(payload)]).tobytes()], list(outputs))
        self._connection.sendall(payload)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def ended(self) -> bool:
        """Whether ``wait`` would return at once."""
        return _readable(self._connection, 0)

    def send_signal(self, number: int) -> None:
        """Send it; of no effect on one that has ended, which ``ended`` tells a moment later."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int:
        """Its exit code, or minus the signal that ended it.

        Raises:
            TimeoutError: it has not ended in time; it is killed.
        """
        ready = _readable(self._connection, seconds)
        answer = self._answers.readline() if ready else ""
        self._answers.close()
        self._connection.close()
        if not answer:
            raise TimeoutError(f"the process has not ended within {seconds} s")
        return int(answer)


# --- the server ---


def serve(address: str, modules: Sequence[str]) -> None:
    """Import, then fork a keeper for every connection, until nobody is left to ask."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # nobody's garbage; looking through it would copy its pages in every process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need nobody to wait for them
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> None:
    """Fork the process, tell its number and its end; exits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
    size, payload = array.array("q", header)[0], b""
    while len(payload) < size:
        payload += connection.recv(size - len(payload))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(payload), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{pid}\n".encode())
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        readable, _, _ = select.select([connection], [], [], _POLL_SECONDS)
        if readable and not connection.recv(1):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)


def _become(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Turn into the process that was asked for; exits."""
    code = 1
    try:
        for target, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        module, _, function = request["target"].partition(":")
        code = int(getattr(importlib.import_module(module), function)(request["argv"]) or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the client ---


def stand_in(address: str, target: str, arguments: Sequence[str]) -> None:
    """Run the process and end as it ends; exits."""
    process = Forked(address, target, arguments, os.environ, (1, 2))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: process.send_signal(received))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        stand_in(sys.argv[1], sys.argv[2], sys.argv[3:])
