"""Real gloo process groups on this machine, with a hard time limit.

When the limit passes, every rank prints the stacks of its threads and exits; the caller gets what they
printed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import fork_server


def main(arguments: list[str]) -> None:
    """One rank: ``RANK WORLD_SIZE FOLDER SECONDS BACKEND``; never returns."""
    (rank, world_size), folder, (limit, backend) = map(int, arguments[:2]), arguments[2], arguments[3:]
    faulthandler.dump_traceback_later(float(limit), exit=True, file=sys.stderr)
    torch.set_num_threads(1)
    try:
        if backend:
            store = dist.FileStore(str(Path(folder) / "rendezvous"), world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        function, args = pickle.loads((Path(folder) / "call").read_bytes())
        torch.save(function(*args), Path(folder) / f"result{rank}")
        if backend:
            dist.barrier()  # no rank leaves while another still talks to it
            dist.destroy_process_group()
        # The result is on disk; the interpreter's teardown would only race with the threads of the group.
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, limit: float = 120.0, backend: str = ""
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh process group, each a process of its own with one
    thread, forked from one that has imported torch and done nothing else.

    Args:
        function: importable by name, since it is called in another process.
        limit: seconds until every rank is stopped.
        backend: of the process group; by default gloo, and no group for a single rank.

    Returns:
        the results in rank order.

    Raises:
        RuntimeError: a rank failed or the limit passed; holds what the ranks printed.
    """
    backend = backend or ("gloo" if world_size > 1 else "")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = [stack.enter_context((Path(folder) / f"log{rank}").open("w+")) for rank in range(world_size)]
        (Path(folder) / "call").write_bytes(pickle.dumps((function, args)))
        processes = [
            fork_server.shared().start(
                "tests.support.ranks:main",
                [str(rank), str(world_size), folder, str(limit), backend],
                os.environ,
                log.fileno(),
            )
            for rank, log in enumerate(logs)
        ]
        codes = [process.wait(limit + 30) for process in processes]
        if any(codes):
            texts = [Path(log.name).read_text() for log in logs]
            raise RuntimeError("\n".join([f"exit codes {codes}", *texts]))
        return [torch.load(Path(folder) / f"result{r}", weights_only=False) for r in range(world_size)]
