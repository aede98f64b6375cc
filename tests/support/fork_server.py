"""Processes that begin with everything imported: a server imports once, then forks one for every request.

    server (imports done, one thread) ──fork──▶ keeper ──fork──▶ the process asked for
                                                  │ tells how it ended; kills it when the client is gone

Run as a script (``python fork_server.py SOCKET MODULE:FUNCTION ARGUMENT …``) this file is a client that
stands for the process: same environment, same output, same end, even by a signal. A launcher that starts
ranks can so start them in milliseconds instead of the seconds that importing torch takes. The client imports
nothing beyond Python's own library.

``shared`` is the one server of a test run, whose processes find it by a folder in their environment.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import hashlib
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
from typing import Any

MODULES = (
    "tests.run.killed_run",
    "tests.support.ranks",
    "offload_sparse.methods.sparse_offload",
    "accelerate",
    "accelerate.commands.launch",
    "torch._dynamo",
    "torch._subclasses.schema_check_mode",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "docstring_parser",
    "pytest",
    "tests.support.sessions",
    "tests.support.reader",
)
"""What a command imports, a launcher, and tests; last, what reads back the exports of all that is forked."""

FOLDER = "OFFLOAD_SPARSE_FORK_SERVERS"
"""Variable that holds the folder of the servers of this test run."""

_POLL_SECONDS = 0.02
_START_SECONDS = 300.0


class ForkServer:
    """A server with these modules for all processes that share a folder: started by the first one that asks
    for a process, it ends once none of them is left.

    Args:
        modules: what it imports before it serves. None of them may start a thread.
        folder: of its socket.
    """

    def __init__(self, modules: Sequence[str], folder: str) -> None:
        self._modules = list(modules)
        self.address = f"{folder}/{hashlib.blake2b(repr(self._modules).encode(), digest_size=6).hexdigest()}"
        self._held: int | None = None

    def _hold(self) -> None:
        """Keep the server, whose standard input ends with the last process that does."""
        if self._held is not None:
            return
        alive = f"{self.address}.alive"
        with open(f"{self.address}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):  # nobody reads it
                self._held = os.open(alive, os.O_WRONLY | os.O_NONBLOCK)
                return
            for path in (self.address, alive):
                Path(path).unlink(missing_ok=True)
            os.mkfifo(alive)
            either = os.open(alive, os.O_RDWR)  # which waits for no other end
            held, read = (os.open(alive, end) for end in (os.O_WRONLY, os.O_RDONLY))
            os.close(either)
            self._start(read)
            self._held = held

    def _start(self, read: int) -> None:
        command = [sys.executable, "-m", "tests.support.fork_server", "--serve", self.address]
        process = subprocess.Popen(
            [*command, *self._modules], stdin=read, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        os.close(read)
        self._process = process  # referred to, or it would be taken for one that nobody has waited for
        assert process.stdout is not None
        if not _readable(process.stdout, _START_SECONDS) or process.stdout.readline() != b"ready\n":
            process.kill()
            raise RuntimeError("the server of processes did not start; its messages are above")

    def run(
        self,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        seconds: float,
        unwinds: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """A process from its beginning to its end, as ``subprocess.run`` has them.

        Raises:
            TimeoutError: it has not ended in time; it is killed.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(target, arguments, environment, out.fileno(), err.fileno(), unwinds)
            code = process.wait(seconds)
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
        unwinds: bool = False,
    ) -> Forked:
        """Begin a process.

        Args:
            target: ``module:function``; called with ``arguments``, returns an exit code or None.
            environment: all of its variables.
            output: file descriptor that becomes its stdout, and its stderr unless ``errors`` is given.
            unwinds: it ends as an interpreter does, with what that runs at its end; else at once.
        """
        self._hold()
        outputs = output, output if errors is None else errors
        return Forked(self.address, target, arguments, environment, outputs, unwinds)


def _readable(file: Any, seconds: float | None) -> bool:
    """Whether there is something to be read in time; of any descriptor, which ``select`` has not room for."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


@cache
def shared(*modules: str) -> ForkServer:
    """The server of this test run with these modules, or with ``MODULES``."""
    return ForkServer(modules or MODULES, os.environ[FOLDER])


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
        unwinds: bool = False,
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        request: dict[str, Any] = {"target": target, "argv": list(arguments), "unwinds": unwinds}
        request |= {"env": dict(environment), "cwd": os.getcwd()}
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
    if request["unwinds"]:
        sys.exit(_called(request, descriptors))
    code = 1
    try:
        code = _called(request, descriptors)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _called(request: dict[str, Any], descriptors: Sequence[int]) -> int:
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, target)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    module, _, function = request["target"].partition(":")
    return int(getattr(importlib.import_module(module), function)(request["argv"]) or 0)


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
