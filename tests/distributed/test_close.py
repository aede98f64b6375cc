"""A session leaves nothing behind that could hang or abort a process: neither a thread nor a group."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from offload_sparse.engine.config import RoundConfig
from offload_sparse.policy.config import PolicyConfig
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


OWN_LOOP = """
import sys, torch
import torch.distributed as dist
from tests.distributed.test_close import POLICY, ROUNDS
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net

store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
session = make_session(small_net(), POLICY, ROUNDS)
for batch in batches(6):
    session.step(loss_of(own_part(batch)))
dist.barrier()
print("done", flush=True)
if sys.argv[3] == "destroys":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("end", ["destroys", "leaves"])
def test_a_loop_that_closes_nothing_ends_without_a_word(tmp_path: Path, end: str) -> None:
    """In the middle of a round, with its default group destroyed or not."""
    command = [sys.executable, "-c", OWN_LOOP, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out == "done\n"
        assert "terminate called" not in err
