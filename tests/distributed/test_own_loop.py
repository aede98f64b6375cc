"""A loop of one's own under a real ``accelerate launch``: saved by two processes, resumed by one, two and
three.

AdamW in two parameter groups, one frozen layer, a scheduler of torch, in float64.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.launches import launch


def started(processes: int, port: int, *arguments: str) -> dict[str, str]:
    """Run ``launch/own_loop.py``; what it prints of its state: {"resumed 5": digest, "state 12": digest}."""
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]
    run = launch(
        ["--steps", "12", *arguments],
        several if processes > 1 else [],
        "launch/own_loop.py",
        ACCELERATE_USE_CPU="true",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    printed = re.findall(r"^(resumed|state) (\d+) (\w+)", run.stdout, re.MULTILINE)
    return {f"{what} {step}": bits for what, step, bits in printed}


def test_two_processes_save_and_one_two_and_three_resume(tmp_path: Path) -> None:
    """The state has the same bits wherever it is read; two processes end with those of the run that went
    on.
    """
    state = str(tmp_path / "state.pt")
    straight = started(2, 29871)
    saved = started(2, 29872, "--until", "5", "--save", state)["state 5"]
    for processes in (1, 3):
        found = started(processes, 29873, "--resume", state, "--until", "5")
        assert found == {"resumed 5": saved, "state 5": saved}, processes
    assert started(2, 29874, "--resume", state)["state 12"] == straight["state 12"]
    assert started(1, 29875, "--resume", state, "--export", str(tmp_path / "network"))["resumed 5"] == saved
    assert (tmp_path / "network" / "weights.safetensors").exists()
