"""A process that is lost takes nothing with it: ranks end with their launcher, and a run whose data worker is
killed says so in one line.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from offload_sparse.cli.main import main
from offload_sparse.config.run import RunConfig
from offload_sparse.run import trainer
from offload_sparse.run.errors import RunError
from offload_sparse.run.launch import launched
from offload_sparse.store.lock import lock_folder
from tests.run import killed_run

LIMIT = 240
ENDLESS = ["--train.max_steps", "1000000", "--checkpoint.every", "1000000"]


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < LIMIT
        assert process is None or process.poll() is None, "it has ended"
        time.sleep(0.05)


def trains(run_dir: Path) -> bool:
    log = run_dir / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def parent_of(process: int) -> int:
    found = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1])


def assert_saved_and_free(run_dir: Path) -> None:
    with lock_folder(run_dir):
        assert list((run_dir / "checkpoints").glob("step_*[0-9]"))


def test_a_rank_saves_and_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run_it", tmp_path / "log"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    with log.open("w") as output:
        rank = killed_run.start(tmp_path, "it", ENDLESS, environment, output.fileno())
        wait_until(lambda: trains(run_dir))
        os.kill(parent_of(rank.pid), signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{rank.pid}").exists())
    assert "(SIGTERM); the same command resumes" in log.read_text()
    assert_saved_and_free(run_dir)


@pytest.mark.slow
def test_sigkill_of_accelerate_launch_ends_both_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", port, "-m", "offload_sparse.cli", "train", *killed_run.OPTIONS]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, *ENDLESS, "--run_dir", str(run_dir)], env=environment, stdout=log, stderr=log
        )
        wait_until(lambda: trains(run_dir), launcher)
        children = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
        ranks = [int(pid) for pid in Path(children).read_text().split()]
        launcher.kill()
        launcher.wait(LIMIT)
        assert len(ranks) == 2
        try:
            wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert_saved_and_free(run_dir)


def test_a_data_worker_killed_for_want_of_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The OOM killer sends SIGKILL; with workers again the same command ends the run."""
    original = trainer.Run.train_step

    def train_step(run: trainer.Run, step: int, batch: Any) -> None:
        for worker in multiprocessing.active_children() if step == 4 else ():
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
        original(run, step, batch)

    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["train", *killed_run.OPTIONS, "--data.num_workers", "1", "--run_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "train_step", train_step)
        assert main(command) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [text for text in said.splitlines() if "error:" in text]
    assert (
        "a process that loads data was killed, most likely for want of memory; lower data.num_workers" in line
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(command) == 0
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_data_worker_that_leaves_its_pipe_first_is_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from it ends at once; the signal of its end, at which torch raises wherever it comes, may
    come while trackers end."""

    def at_the_signal(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    heard = []

    def end_training(_: Accelerator) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        heard.append(True)

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "end_training", end_training)
    before = signal.signal(signal.SIGCHLD, at_the_signal)
    here, there = multiprocessing.Pipe()
    there.close()
    try:
        with (
            pytest.raises(RunError, match="a process that loads data was killed"),
            launched(RunConfig(run_dir=tmp_path, trackers=[])),
        ):
            here.recv()
        assert heard
        assert signal.getsignal(signal.SIGCHLD) is at_the_signal
    finally:
        signal.signal(signal.SIGCHLD, before)
    AcceleratorState._reset_state(reset_partial_state=True)
