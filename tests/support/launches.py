"""``accelerate launch`` as a user types it, on one or two CPU processes, of a small run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--config",
    "configs/quickstart.yaml",
    "--data.limit",
    "256",
    "--data.batch_size",
    "32",
    "--model.arguments.width",
    "0.5",
    "--round.k",
    "3",
    "--train.check",
    "false",
]


def launch(arguments: list[str], launcher: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``accelerate launch <launcher> launch/train.py <arguments>`` with a hard time limit."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "launch/train.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def two_ranks(arguments: list[str], port: int) -> subprocess.CompletedProcess[str]:
    """Run ``launch/train.py <arguments>`` on two ranks of this machine, both on the CPU."""
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    return launch(arguments, launcher, ACCELERATE_USE_CPU="true")
