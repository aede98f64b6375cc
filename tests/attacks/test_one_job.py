"""A run folder serves one job: a second one is told so at once, and the first does not notice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from offload_sparse.cli.main import main
from offload_sparse.engine.faults import VARIABLE
from tests.run import killed_run
from tests.support import fork_server
from tests.support.fork_server import Forked

SMALL = [
    *("train", "--model.name", "offload_sparse/mlp"),
    *("--model.arguments", "{stream: 12, hidden: 24, depth: 1}"),
    *("--data.limit", "64", "--data.batch_size", "8", "--trackers", "[]"),
    *("--train.max_steps", "12", "--train.log_every", "1"),
]
LIMIT = 240


def start(run_dir: Path, *more: str, fault: str = "", python: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *python, "-m", "offload_sparse.cli", *SMALL, "--run_dir", str(run_dir), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", VARIABLE: fault}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=environment)


def forked(run_dir: Path, *more: str, fault: str = "") -> Forked:
    """The same job, in a process that is forked with everything imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", VARIABLE: fault}
    command = [*SMALL, "--run_dir", str(run_dir), *more]
    with run_dir.with_suffix(".log").open("a") as log:
        server = fork_server.shared()
        return server.start("offload_sparse.cli.main:main", command, environment, log.fileno())


def stopped_in_step(run_dir: Path, *more: str) -> Forked:
    """A job that stands still (SIGSTOP) in its third step."""
    first = forked(run_dir, *more, fault="hang:step=3:phase=step")
    begun = time.monotonic()
    while "State:\tT" not in Path(f"/proc/{first.pid}/status").read_text():
        assert time.monotonic() - begun < LIMIT
        assert not first.ended()
        time.sleep(0.05)
    return first


def steps(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_second_start_on_a_live_run_is_refused(tmp_path: Path) -> None:
    """It exits with 2 before it imports torch, and the first run is undisturbed; also one that has another
    folder, but the same store.
    """
    run_dir, store = tmp_path / "run", ("--store.tier", "file", "--store.path", str(tmp_path / "store"))
    first = stopped_in_step(run_dir, *store)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for more in ((), ("--overwrite", "true"), ("--train.epochs", "9")):
        second = start(run_dir, *more)
        error = second.communicate(timeout=LIMIT)[1]
        assert second.returncode == 2
        assert f"{run_dir} is in use by process {first.pid} on {os.uname().nodename}" in error
        assert error.count("\n") == 1
    other = forked(tmp_path / "other", *store)
    assert other.wait(LIMIT) == 2
    error = (tmp_path / "other.log").read_text()
    assert f"{tmp_path / 'store'} is in use by process {first.pid} on" in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    imports = start(run_dir, python=("-X", "importtime")).communicate(timeout=LIMIT)[1]
    assert re.search(r"\| +json$", imports, re.MULTILINE)
    assert not re.search(r"\| +torch$", imports, re.MULTILINE)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    (tmp_path / "other.log").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    while not first.ended():  # it stops again at each of its steps
        first.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    assert first.wait(LIMIT) == 0
    assert steps(run_dir) == list(range(1, 13))


def test_the_folder_of_a_killed_job_is_free_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = forked(run_dir, "--checkpoint.every", "1", fault="kill:step=5:phase=step")
    assert first.wait(LIMIT) == -signal.SIGKILL
    again = forked(run_dir, "--checkpoint.every", "1")
    assert again.wait(LIMIT) == 0, run_dir.with_suffix(".log").read_text()
    assert steps(tmp_path / "run") == list(range(1, 13))


@pytest.mark.slow
def test_of_two_starts_at_once_exactly_one_trains(tmp_path: Path) -> None:
    jobs: list[Any] = [start(tmp_path / "run") for _ in range(2)]
    outputs = [job.communicate(timeout=LIMIT) for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], outputs
    refused = outputs[0 if jobs[0].returncode else 1][1]
    assert "is in use by" in refused
    assert steps(tmp_path / "run") == list(range(1, 13))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_it_is_one_each_time(times: int, tmp_path: Path) -> None:
    """Processes that are forked with everything imported, and so start within a moment."""
    with (tmp_path / "log").open("w") as log:
        for number in range(times):
            name = f"{number}"
            more = ["--train.log_every", "1"]
            jobs = [
                killed_run.start(tmp_path, name, more, os.environ, log.fileno()) for _ in range(2)
            ]
            assert sorted(job.wait(LIMIT) for job in jobs) == [0, 2], (tmp_path / "log").read_text()
            assert steps(tmp_path / f"run_{name}") == list(range(1, 13))
    assert (tmp_path / "log").read_text().count("is in use by") == times


def begin_a_session(arguments: list[str]) -> int:
    os.setsid()
    return main(arguments)


def test_sigterm_to_the_whole_group_with_loader_workers_saves_and_exits_0(tmp_path: Path) -> None:
    """As Slurm and ``timeout`` send it."""
    arguments = [*SMALL, "--run_dir", str(tmp_path / "run")]
    arguments += ["--train.max_steps", "100000", "--data.num_workers", "2"]
    with (tmp_path / "log").open("w") as log:
        target = f"{__name__}:begin_a_session"
        job = fork_server.shared().start(target, arguments, os.environ, log.fileno(), unwinds=True)
        begun = time.monotonic()
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            assert time.monotonic() - begun < LIMIT
            assert not job.ended(), (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGTERM)
        code = job.wait(LIMIT)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert "(SIGTERM); the same command resumes" in said
    assert "Traceback" not in said
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
