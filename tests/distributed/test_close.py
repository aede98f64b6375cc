"""A session leaves nothing behind that could hang or abort a process: neither a thread nor a group."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from offload_sparse.engine.config import RoundConfig
from offload_sparse.policy.config import PolicyConfig
from tests.support import fork_server
from tests.support.ranks import run_ranks
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net

ROUNDS = RoundConfig(k=4, transfer="overlap")
POLICY = PolicyConfig.paper(rho=0.5, lr=0.05)


def groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def transfer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("transfer")]


def left_in_a_round(abandon: bool) -> dict[str, Any]:
    """A loop stops in the middle of a round, while the next one is being fetched."""
    before = groups()
    session = make_session(small_net(), POLICY, ROUNDS)
    for batch in batches(6):
        session.step(loss_of(own_part(batch)))
    found = {"threads": transfer_threads(), "groups": groups() - before}
    session.close(abandon)
    session.close(abandon)
    with pytest.raises(ValueError, match="ended this session"):
        session.step(loss_of(batches(1)[0]))
    return found | {"threads left": transfer_threads(), "groups left": groups() - before}


@pytest.mark.parametrize("abandon", [False, True])
def test_a_closed_session_has_neither_threads_nor_groups(abandon: bool) -> None:
    for found in run_ranks(2, left_in_a_round, abandon):
        assert len(found["threads"]) == 1
        assert found["groups"] == 2
        assert (found["threads left"], found["groups left"]) == ([], 0)


def own_loop(arguments: list[str]) -> None:
    """One of two ranks; what a script has in its variables is there until its interpreter has ended."""
    folder, end, rank = arguments
    store = dist.FileStore(f"{folder}/{end}", 2)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    session = make_session(small_net(), POLICY, ROUNDS)
    for batch in batches(6):
        session.step(loss_of(own_part(batch)))
    dist.barrier()
    print("done", flush=True)
    vars(sys.modules["__main__"]).update(store=store, session=session)
    if end == "destroys":
        dist.destroy_process_group()


@pytest.mark.parametrize("end", ["destroys", "leaves"])
def test_a_loop_that_closes_nothing_ends_without_a_word(end: str, tmp_path: Path) -> None:
    """In the middle of a round, with its default group destroyed or not."""
    ranks = []
    for rank in range(2):
        arguments = [str(tmp_path), end, str(rank)]
        with (tmp_path / f"{rank}.out").open("w") as out, (tmp_path / f"{rank}.err").open("w") as err:
            outputs = out.fileno(), err.fileno()
            server = fork_server.shared()
            ranks.append(server.start(f"{__name__}:own_loop", arguments, os.environ, *outputs, unwinds=True))
    codes = [rank.wait(240) for rank in ranks]
    for rank, code in enumerate(codes):
        err_of_rank = (tmp_path / f"{rank}.err").read_text()
        assert code == 0, err_of_rank
        assert (tmp_path / f"{rank}.out").read_text() == "done\n"
        assert "terminate called" not in err_of_rank
