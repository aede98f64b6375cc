"""The same command resumes: whatever way a run was started and wherever it was killed or lost its power, it
ends with the bits of the run that was never disturbed.

The default tests try a few points of every way, ``pytest -m slow`` and ``offload-sparse bench faults`` all.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.bench import watched_disk
from offload_sparse.bench.faults import KINDS, WAYS, Sweep, outcome
from offload_sparse.bench.watched_disk import Tree, WatchedDisk
from offload_sparse.cli.main import main
from offload_sparse.engine.faults import VARIABLE
from offload_sparse.run import trainer
from offload_sparse.store.files import make_folder, remove, replacing, write_file
from tests.run import killed_run
from tests.support.fork_server import shared

FEW = 1
"""Calls of every way before which it is cut off, in each of the four kinds."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with Sweep(tmp_path_factory.mktemp("sweep"), processes=2) as sweep:
        yield sweep


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", WAYS)
def test_a_few_points_of_every_way(way: str, sweep: Sweep) -> None:
    """Kills, and losses of power that leave nothing, the names, or some of what was not waited for; these
    cost no more than the checkpoint that was being written.
    """
    swept = sweep.way(way, FEW)
    assert not swept.lost
    assert swept.steps_lost <= 2
    assert swept.points == swept.survived == dict.fromkeys(KINDS, FEW)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("way", WAYS)
def test_every_point_of_every_way_once_and_twice(way: str, sweep: Sweep) -> None:
    swept = sweep.way(way, twice=3)
    assert not swept.lost
    assert swept.points["kill"] > 50
    assert swept.points["twice"] >= swept.points["kill"]


# --- with steps that are left out --------------------------------------------------------------------------

POISONED = 8


def poisoned(argv: list[str]) -> int:
    """A run whose loss is NaN once."""
    loss, step = killed_run._loss_with_dropout, trainer.Run.train_step
    now: list[bool] = []

    def train_step(run: trainer.Run, number: int, batch: Any) -> None:
        if number == POISONED and not now:
            print("poisoned", flush=True)
            now.append(True)
        try:
            step(run, number, batch)
        finally:
            now[:] = [False] * len(now)

    def classification_loss(*arguments: Any, **named: Any) -> Any:
        value, scalars = loss(*arguments, **named)
        return (value * float("nan") if now == [True] else value), scalars

    torch.set_num_threads(1)
    trainer.classification_loss = classification_loss
    trainer.Run.train_step = train_step  # type: ignore[method-assign]
    return main(["train", *argv])


@pytest.mark.parametrize(
    ("reaction", "tier"),
    [
        *(("rollback", "ram"), ("skip", "file")),
        pytest.param("rollback", "file", marks=pytest.mark.slow),
        pytest.param("skip", "ram", marks=pytest.mark.slow),
    ],
)
def test_a_kill_before_a_loss_that_is_not_finite_changes_nothing(
    reaction: str, tier: str, tmp_path: Path
) -> None:
    """Saved (in the middle of a round, where nothing is rolled back), killed, resumed, then back to a
    checkpoint or past the step: weights, log and loss of the run that was not killed.
    """
    options = ["--store.tier", tier, "--train.on_nonfinite", reaction]

    def end_of(name: str, fault: str = "") -> int:
        arguments = [*killed_run.OPTIONS, *options, "--run_dir", str(tmp_path / name)]
        environment = os.environ | {VARIABLE: fault, "OMP_NUM_THREADS": "1"}
        with (tmp_path / name).with_suffix(".log").open("a") as log:
            return shared().start(f"{__name__}:poisoned", arguments, environment, log.fileno()).wait(240)

    assert end_of("straight") == 0
    # The second save waits for the first, so that by then there is one.
    assert end_of("parts", "kill:step=7:phase=step") == -signal.SIGKILL
    assert end_of("parts") == 0
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("straight", "parts")]
    assert [log.count("poisoned") for log in logs] == [1, 1], logs
    assert "resuming at step" in logs[1]
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "straight")


# --- what is noted is what happens ------------------------------------------------------------------------


def changes(folder: Path, die_before: str = "") -> None:
    """Files and folders that come and go as those of a run; in a process that dies before a call."""

    def found(call: str, disk: WatchedDisk) -> None:
        if call == die_before:
            os.kill(os.getpid(), signal.SIGKILL)

    WatchedDisk(folder, found)
    act(folder)


def act(folder: Path) -> None:
    make_folder(folder / "a" / "b")
    write_file(folder / "a" / "b" / "file", b"one" * 500)
    with replacing(folder / "a" / "whole") as temporary:
        temporary.mkdir()
        write_file(temporary / "inner", "text")
    with (folder / "a" / "lines").open("a") as lines:
        lines.write("half a line")
    write_file(folder / "a" / "b" / "file", b"two" * 900)
    remove(folder / "a" / "whole")


def noted(folder: Path) -> list[tuple[str, dict[str, Tree]]]:
    """Every call of ``act`` in a process of its own, with what would be left of the folder."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        calls: list[tuple[str, dict[str, Tree]]] = []

        def found(call: str, disk: WatchedDisk) -> None:
            powers = {kind: disk.after_power_loss(kind, len(calls)) for kind in KINDS[1:]}
            calls.append((call, {"kill": disk.as_it_is(), **powers}))

        WatchedDisk(folder, found)
        act(folder)
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(calls, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        calls = pickle.load(pipe)
    os.waitpid(child, 0)
    return calls


def tree_of(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def test_a_kill_before_a_call_leaves_what_was_noted(tmp_path: Path) -> None:
    (tmp_path / "noted").mkdir()
    calls = noted(tmp_path / "noted")
    names = [call for call, _ in calls]
    assert len(names) > 20
    for name in sorted({name for name in names if names.count(name) == 1}):
        folder = tmp_path / name.replace("/", "_").replace(" ", "_")
        folder.mkdir()
        child = os.fork()
        if child == 0:
            changes(folder, name)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = next(trees["kill"] for call, trees in calls if call == name)
        assert tree_of(folder) == left, name


def test_a_loss_of_power_leaves_only_what_was_waited_for(tmp_path: Path) -> None:
    """And everything else as it likes."""
    calls = noted(tmp_path)
    before = dict(reversed(calls))
    renames = [call for call, _ in calls if call.startswith("rename") and "file" in call]
    unnamed = before["fsync a/b"]["nothing"]
    assert "a/b/file" not in unnamed
    assert before["fsync a/b"]["names"]["a/b/file"] == b"one" * 500
    assert renames == ["rename a/b/file.tmp", "rename a/b/file.tmp"]
    last = calls[-1][1]
    assert last["nothing"]["a/b/file"] == b"two" * 900
    assert "a/lines" not in last["nothing"], "nobody has waited for its name"
    assert last["names"]["a/lines"] == b"", "nor for what is in it"
    assert last["kill"]["a/lines"] == b"half a line"
    assert last["nothing"]["a/whole/inner"] == b"text", "nor for its removal"
    assert "a/whole/inner" not in last["kill"]


class Unwatched(WatchedDisk):
    """Only asked what is there; hears of no call."""

    def _watch(self) -> None:
        pass

    def close(self) -> None:
        """Give back the descriptors, which a watched process keeps to its end."""
        for descriptor in self._held.values():
            os.close(descriptor)


class Interrupted:
    """The module ``os`` to whoever lists a folder; before one of its calls another thread gets its turn."""

    def __init__(self, at: int, turn: Callable[[], object]) -> None:
        self._left, self._turn, self.done = at, turn, False

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name not in ("listdir", "open", "fstat", "lstat", "stat", "close"):
            return value

        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self._turn()
                self.done = True
            return value(*arguments)

        return call


TURNS: dict[str, Callable[[Path], object]] = {
    "a rename to a new name": lambda folder: (folder / "a" / "new.tmp").rename(folder / "a" / "new"),
    "a rename over a file": lambda folder: (folder / "a" / "old.tmp").rename(folder / "a" / "old"),
    "a file removed": lambda folder: (folder / "a" / "old").unlink(),
    "a folder removed": lambda folder: (folder / "a" / "empty").rmdir(),
    "a file made": lambda folder: (folder / "b" / "made").touch(),
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_a_tree_stood_on_the_disk_whenever_another_thread_has_its_turn(
    turn: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, done = 0, True
    while done:
        folder, at = tmp_path / str(at), at + 1
        for name in ("a/empty", "b"):
            (folder / name).mkdir(parents=True)
        disk = Unwatched(folder, lambda call, disk: None)
        for name in ("old", "old.tmp", "new.tmp"):
            (folder / "a" / name).write_text(name)
        before = tree_of(folder)
        with monkeypatch.context() as patch:
            interrupted = Interrupted(at, partial(turn, folder))
            patch.setattr(watched_disk, "os", interrupted)
            noted = disk.as_it_is()
        done = interrupted.done
        assert noted in (before, tree_of(folder))
        assert disk.as_it_is() == tree_of(folder)
        disk.close()
    assert at > 10
