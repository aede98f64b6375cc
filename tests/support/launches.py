"""``accelerate launch`` as a user types it, on one or two CPU processes, of a small run."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from tests.support import fork_server

ROOT = Path(__file__).resolve().parents[2]
_PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LIMIT = 240
SMALL = [
    "--config",
    "configs/quickstart.yaml",
    "--data.limit",
    "256",
    "--data.batch_size",
    "32",
    "--model.arguments.width",
    "0.5",
    "--policy.search",
    "sampled",
    "--round.k",
    "3",
    "--train.check",
    "false",
]


def launch(
    arguments: list[str],
    launcher: list[str],
    script: str = "launch/train.py",
    typed: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``accelerate launch <launcher> <script> <arguments>`` with a hard time limit.

    Args:
        script: a file, or the name of a module.
        typed: as in a shell. Else the launcher is forked with everything imported, and every process that it
            starts stands for one that is (``fork_server.stand_in``): nothing else differs.
    """
    clean = {k: v for k, v in os.environ.items() if k not in _PLACES}
    clean |= {"OMP_NUM_THREADS": "1"} | environment
    if typed:
        module = [] if script.endswith(".py") else ["-m"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *module, script, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=_LIMIT, check=False
        )
    server = fork_server.shared()
    rank = [fork_server.__file__, server.address, "tests.support.launches:run_script", script]
    line = [*launcher, *rank, *arguments]
    return server.run("tests.support.launches:run_launcher", line, clean, _LIMIT)


def run_launcher(arguments: list[str]) -> None:
    """What ``accelerate launch`` does, in a process that was forked."""
    from accelerate.commands.launch import main

    os.chdir(ROOT)
    sys.argv = ["accelerate-launch", *arguments]
    main()


def run_script(arguments: list[str]) -> None:
    """What ``python SCRIPT …`` or ``python -m MODULE …`` does, in a process that was forked."""
    sys.argv[:] = arguments
    if arguments[0].endswith(".py"):
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def two_ranks(arguments: list[str], port: int, typed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``launch/train.py <arguments>`` on two ranks of this machine, both on the CPU."""
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    return launch(arguments, launcher, typed=typed, ACCELERATE_USE_CPU="true")
