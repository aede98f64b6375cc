"""The Slurm script, with stand-ins for Slurm's programs: what it launches, when it queues itself again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# srun runs the task in a session of its own, whose processes scancel signals as slurmstepd would.
PROGRAMS = {
    "srun": 'shift; echo "$SRUN_CPUS_PER_TASK" > "$STUBS/cpus"; echo $$ > "$STUBS/step"; exec setsid "$@"',
    "scontrol": '[ "$1" != show ] && echo "$*" >> "$STUBS/requeued" || printf "10.0.0.7\\n10.0.0.8\\n"',
    "scancel": 'pkill "-${1#--signal=}" -s "$(cat "$STUBS/step")"',
    "accelerate": 'echo "$*" > "$STUBS/launched"; exec "$PYTHON" "$STUBS/training.py"',
}

# What matters of a run: it notes SIGUSR1 (which its launcher ignores), and then ends with 0.
TRAINING = """
import os, signal, sys
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
open(os.environ["STUBS"] + "/ready", "w").close()
if os.environ["ENDS"] == "itself":
    sys.exit(int(os.environ["CODE"]))
signal.signal(signal.SIGALRM, lambda *_: sys.exit(99))
signal.alarm(60)
while not asked:
    signal.pause()
sys.exit(int(os.environ["CODE"]))
"""


def start(stubs: Path, ends: str, code: int = 0) -> subprocess.Popen[bytes]:
    stubs.mkdir()
    for name, body in PROGRAMS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    (stubs / "training.py").write_text(TRAINING)
    os.mkfifo(stubs / "ready")
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "PYTHON": sys.executable,
        "ENDS": ends,
        "CODE": str(code),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_NODEID": "1",
    }
    process = subprocess.Popen(["bash", "launch/slurm.sh", "--policy.rho", "0.1"], cwd=ROOT, env=environment)
    (stubs / "ready").open().close()  # waits until the training has its handlers
    return process


def test_every_node_starts_one_launcher(tmp_path: Path) -> None:
    """The launchers meet on the first node, and have the cores that the job has."""
    assert start(tmp_path / "stubs", "itself").wait(60) == 0
    launched = (tmp_path / "stubs" / "launched").read_text().split()
    assert launched[:3] == ["launch", "--config_file", "launch/multi_node.yaml"]
    options = dict(zip(launched[3:13:2], launched[4:13:2], strict=False))
    assert options == {
        "--num_machines": "2",
        "--num_processes": "16",
        "--machine_rank": "1",
        "--main_process_ip": "10.0.0.7",
        "--main_process_port": "20041",
    }
    assert (tmp_path / "stubs" / "cpus").read_text() == "16\n"
    assert launched[13:] == ["launch/train.py", "--policy.rho", "0.1"]
    assert not (tmp_path / "stubs" / "requeued").exists(), "a run that is complete"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_an_interrupted_job_saves_and_queues_itself_again(number: signal.Signals, tmp_path: Path) -> None:
    job = start(tmp_path / "stubs", "when asked")
    job.send_signal(number)
    assert job.wait(60) == 0
    assert (tmp_path / "stubs" / "requeued").read_text() == "requeue 41\n"


@pytest.mark.parametrize("ends", ["itself", "when asked"])
def test_a_run_that_fails_is_not_queued_again(ends: str, tmp_path: Path) -> None:
    job = start(tmp_path / "stubs", ends, code=2)
    if ends == "when asked":
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 2
    assert not (tmp_path / "stubs" / "requeued").exists()
