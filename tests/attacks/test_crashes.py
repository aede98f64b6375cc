"""The same command resumes: whatever way a run was started and wherever it was killed or lost its power, it
ends with the bits of the run that was never disturbed.

The default tests try a few points of every way, ``pytest -m slow`` and ``offload-sparse bench faults`` all.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload_sparse.bench.faults import KINDS, WAYS, Sweep
from offload_sparse.bench.watched_disk import Tree, WatchedDisk
from offload_sparse.store.files import make_folder, remove, replacing, write_file

FEW = 2


@pytest.fixture(scope="module")
def sweep() -> Iterator[Sweep]:
    with Sweep(processes=2) as sweep:
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
    assert swept.points["kill"] > 100
    assert swept.points["twice"] >= swept.points["kill"]


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
