"""A session leaves nothing behind that could hang or abort a process: neither a thread nor a group."""

from __future__ import annotations

import json
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


OWN_LOOPS = """
import json, os, sys
import torch.distributed as dist
from tests.distributed.test_close import POLICY, ROUNDS
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net

ranks = {}
for end in ("destroys", "leaves"):
    for rank in range(2):
        ranks[f"{end} {rank}"] = pid = os.fork()
        if pid == 0:
            break
    if pid == 0:
        break
else:
    print(json.dumps({name: os.waitpid(pid, 0)[1] for name, pid in ranks.items()}))
    sys.exit()

for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{sys.argv[1]}/{end} {rank}.{name}", os.O_CREAT | os.O_WRONLY), stream)
store = dist.FileStore(f"{sys.argv[1]}/{end}", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
session = make_session(small_net(), POLICY, ROUNDS)
for batch in batches(6):
    session.step(loss_of(own_part(batch)))
dist.barrier()
print("done", flush=True)
if end == "destroys":
    dist.destroy_process_group()
"""
"""Two of two ranks each, forked from one process that has imported torch; they end as interpreters do."""


@pytest.fixture(scope="module")
def own_loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("loops")
    command = [sys.executable, "-c", OWN_LOOPS, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=240, check=True)
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("end", ["destroys", "leaves"])
def test_a_loop_that_closes_nothing_ends_without_a_word(
    own_loops: tuple[Path, dict[str, int]], end: str
) -> None:
    """In the middle of a round, with its default group destroyed or not."""
    folder, statuses = own_loops
    for rank in range(2):
        name = f"{end} {rank}"
        err = (folder / f"{name}.err").read_text()
        assert statuses[name] == 0, err
        assert (folder / f"{name}.out").read_text() == "done\n"
        assert "terminate called" not in err
