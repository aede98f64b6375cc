"""A folder serves one job at a time; the lock of a job that died holds nothing."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from offload_sparse.store.lock import LOCK_FILE, lock_folder


def hold(folder: Path, locked: Event, end: Event, shared: bool = False) -> None:
    lock_folder(folder, shared=shared)
    locked.set()
    end.wait(60)


def holder(folder: Path, shared: bool = False) -> tuple[mp.Process, Event]:
    """A process that holds the lock until it is told to end."""
    context = mp.get_context("fork")
    locked, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder, locked, end, shared))
    process.start()
    assert locked.wait(60)
    return process, end  # type: ignore[return-value]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    process, end = holder(tmp_path)
    with pytest.raises(ValueError, match=f"is in use by process {process.pid} on {os.uname().nodename}"):
        lock_folder(tmp_path)
    end.set()
    process.join()
    lock_folder(tmp_path).release()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK_FILE).exists(), "the file is left over, the lock is not"
    lock_folder(tmp_path).release()


def test_ranks_of_one_job_share_and_the_last_keeps_others_out(tmp_path: Path) -> None:
    first = lock_folder(tmp_path)
    first.share()
    process, end = holder(tmp_path, shared=True)  # a fork forgets its parent's locks
    first.release()
    with pytest.raises(ValueError, match="is in use by"):
        lock_folder(tmp_path)
    end.set()
    process.join()
    lock_folder(tmp_path).release()


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    child, end = holder(tmp_path / "other")
    lock.release()
    lock_folder(tmp_path).release()
    end.set()
    child.join()


def test_a_forked_child_that_lets_go_leaves_its_parents_lock(tmp_path: Path) -> None:
    """As one does that ends by an exception inside the parent's block."""
    lock = lock_folder(tmp_path)
    child = os.fork()
    if child == 0:
        own = os.open(tmp_path / "own", os.O_RDWR | os.O_CREAT)  # by the number that the lock had
        try:
            lock.release()
            os.fstat(own)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / LOCK_FILE).exists(), "another job would lock a new file, and both would run"
    lock.release()


def test_within_a_process_a_folder_can_be_locked_twice(tmp_path: Path) -> None:
    with lock_folder(tmp_path), lock_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    lock_folder(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("kept")
    assert (tmp_path / "run" / "file").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); give another folder"):
        lock_folder(tmp_path / "file" / "run")
