"""``offload-sparse``: which commands there are, how one is started, and how it ends."""

from __future__ import annotations

import difflib
import errno
import importlib.metadata
import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from offload_sparse.cli.look_commands import bench, doctor, report
from offload_sparse.cli.network_commands import evaluate, export
from offload_sparse.cli.run_commands import config, plan, train
from offload_sparse.cli.verify import verify
from offload_sparse.config.parse import PROGRAM, MistakesError
from offload_sparse.run.errors import RunError, disk_fails

Command = Callable[[Sequence[str]], int]
"""Takes the arguments behind the name of the command, returns the exit code."""

GROUPS: Mapping[str, Mapping[str, Command]] = {
    "a run": {"train": train},
    "before it": {"doctor": doctor, "verify": verify, "plan": plan, "config": config},
    "after it": {"evaluate": evaluate, "report": report, "export": export},
    "figures of the project": {"bench": bench},
}

COMMANDS: Mapping[str, Command] = {name: run for group in GROUPS.values() for name, run in group.items()}

TRACEBACK_VARIABLE = "OFFLOAD_SPARSE_TRACEBACK"
LONGEST_LINE = 600
"""Characters of an error line; a longer one loses its middle."""

_FILE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_NO_PLACE = (errno.ENAMETOOLONG, errno.ELOOP)
"""Of a path that can lead nowhere; no class of its own."""
_STDOUT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The program: dispatch to a command. Returns its exit code, or 2 for bad input, told in one line on
    stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(given))


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; bad input becomes one line on stderr and exit code 2.

    Bad input is a ``ValueError``, or a file that is missing or cannot be used. Only rank 0 prints, so that a
    launch of several processes shows the line once (ranks agree on it, see ``on_every_rank``; where one ends
    alone, it leaves the others its word); with ``OFFLOAD_SPARSE_TRACEBACK=1`` after its traceback.

    A run that diverged (``FloatingPointError``) is told in the same way, with exit code 1; one that failed
    (``RunError``) by every rank, since the others may not live to tell. A disk that is full is 1, too. Ctrl-C
    outside the steps of a run (which save first) is 130. Where nobody reads any more what is printed, as
    behind ``head``, a command ends without a word, by 141.
    Returns the command's exit code, 0 where it returns None."""
    try:
        code = command() or 0
        print(end="", flush=True)  # where there is a stdout
        return code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_without_reader(_STDOUT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # for what is still to be printed
            return 141
        fails = disk_fails(error) or isinstance(error, FloatingPointError | RunError)
        bad_path = isinstance(error, OSError) and error.errno in _NO_PLACE
        if not fails and not bad_path and not isinstance(error, (ValueError, *_FILE_ERRORS)):
            raise
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RunError):
            if os.environ.get(TRACEBACK_VARIABLE) == "1":
                traceback.print_exc()
            for line in error.lines if isinstance(error, MistakesError) else (_one_line(error),):
                line = line if len(line) <= LONGEST_LINE else f"{line[:400]} … {line[-200:]}"
                printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
                print(f"{PROGRAM}: error: {printable}", file=sys.stderr)
        return 1 if fails else 2


def _is_without_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _one_line(error: Exception) -> str:
    if disk_fails(error):
        return f"{error.filename or 'a file'} cannot be written ({error.strerror}); free space"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if _raised_here(error) else f"{text} (set {TRACEBACK_VARIABLE}=1 to see where it was raised)"


def _raised_here(error: Exception) -> bool:
    """Whether the package itself raised the error, and not a library that it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("offload_sparse")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(importlib.metadata.version(PROGRAM))
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        advice = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {argv[0]}; {advice}")
    return command(argv[1:])


def _help() -> str:
    from offload_sparse.run.terminal import fitted

    lines = [f"usage: {PROGRAM} COMMAND [--KEY VALUE ...]"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        whats = {name: (run.__doc__ or "").splitlines()[0] for name, run in commands.items()}
        lines += [fitted(f"  {name:<10}{what}", f"{'':<10}") for name, what in whats.items()]
    lines += ["", f"`{PROGRAM} COMMAND --help` lists a command's options. `--version` prints the version."]
    train_it = f"{PROGRAM} train --config configs/quickstart.yaml"
    lines += ["", "examples:", f"  {train_it}", f"  {train_it} --policy.rho 0.1 --run_dir runs/rho_0.1"]
    return "\n".join([*lines, f"  {PROGRAM} evaluate runs/rho_0.1"])
