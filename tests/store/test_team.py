"""All threads of a team work at once, on whatever threads there are, and the caller waits for all."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from offload_sparse.store.copy import team


def recorded(parties: int) -> tuple[Callable[[int], None], list[tuple[int, int]]]:
    """Work that ends when ``parties`` threads do it at once, and what it was called with on which thread."""
    barrier, calls = threading.Barrier(parties), list[tuple[int, int]]()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def work(arguments: int) -> None:
        barrier.wait(timeout=60)
        calls.append((arguments, threading.get_ident()))

    return work, calls


def test_one_thread_is_the_caller() -> None:
    work, calls = recorded(1)
    team.run_on_team(work, 7, 1)
    assert calls == [(7, threading.get_ident())]


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is found through /proc")
def test_the_main_thread_copies_with_the_openmp_threads_of_torch() -> None:
    path = team._runtimes()[0]
    assert path.startswith(torch.__path__[0])
    assert team._openmp() is not None
    threads = torch.get_num_threads()
    work, calls = recorded(threads)
    team.run_on_team(work, 7, threads)
    assert sorted(arguments for arguments, _ in calls) == [7] * threads
    assert len({thread for _, thread in calls}) == threads
    assert not team._pools.get(threads), "our own threads would get in the way of those that spin"


@pytest.mark.parametrize("where", ["without OpenMP", "on another thread"])
def test_elsewhere_our_own_threads_help(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_pools", {})
    work, calls = recorded(3)
    if where == "without OpenMP":
        monkeypatch.setattr(team, "_openmp", lambda: None)
        team.run_on_team(work, 7, 3)
    else:
        caller = threading.Thread(target=team.run_on_team, args=(work, 7, 3))
        caller.start()
        caller.join()
    assert len({thread for _, thread in calls}) == 3
    assert 3 in team._pools
