"""``offload-sparse``: which commands there are, and how one is started."""

from __future__ import annotations

import difflib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence

from offload_sparse.cli.bench import bench
from offload_sparse.cli.command import run_command
from offload_sparse.cli.config import config
from offload_sparse.cli.doctor import doctor
from offload_sparse.cli.evaluate import evaluate
from offload_sparse.cli.export import export
from offload_sparse.cli.plan import plan
from offload_sparse.cli.report import report
from offload_sparse.cli.train import train
from offload_sparse.cli.verify import verify
from offload_sparse.config.parse import PROGRAM

Command = Callable[[Sequence[str]], int]
"""Takes the arguments behind the name of the command, returns the exit code."""

GROUPS: Mapping[str, Mapping[str, Command]] = {
    "a run": {"train": train},
    "before it": {"doctor": doctor, "verify": verify, "plan": plan, "config": config},
    "after it": {"evaluate": evaluate, "report": report, "export": export},
    "figures of the project": {"bench": bench},
}

COMMANDS: Mapping[str, Command] = {name: run for group in GROUPS.values() for name, run in group.items()}

_EXAMPLES = (
    f"{PROGRAM} train --config configs/quickstart.yaml",
    f"{PROGRAM} train --config configs/quickstart.yaml --policy.rho 0.1 --run_dir runs/rho_0.1",
    f"{PROGRAM} evaluate runs/rho_0.1",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The program: dispatch to a command.

    Returns:
        Exit code: that of the command, or 2 for bad input, told in one line on stderr.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(given))


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
    lines = [f"usage: {PROGRAM} COMMAND [--KEY VALUE ...]"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<10}{(run.__doc__ or '').splitlines()[0]}" for name, run in commands.items()]
    lines += ["", f"`{PROGRAM} COMMAND --help` lists a command's options. `--version` prints the version."]
    lines += ["", "examples:", *(f"  {example}" for example in _EXAMPLES)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
