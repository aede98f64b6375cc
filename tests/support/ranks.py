"""Real gloo process groups on this machine, with a hard time limit.

When the limit passes, every rank prints the stacks of its threads and exits; the caller gets what they
printed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(
    rank: int,
    world_size: int,
    folder: str,
    limit: float,
    backend: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    log = open(Path(folder) / f"log{rank}", "w")  # noqa: SIM115 - lives as long as the process
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.stderr)
    torch.set_num_threads(1)
    try:
        if backend:
            store = dist.FileStore(str(Path(folder) / "rendezvous"), world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
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
    thread.

    Args:
        function: importable by name, since the processes are spawned.
        limit: seconds until every rank is stopped.
        backend: of the process group; by default gloo, and no group for a single rank.

    Returns:
        the results in rank order.

    Raises:
        RuntimeError: a rank failed or the limit passed; holds what the ranks printed.
    """
    context = mp.get_context("spawn")
    backend = backend or ("gloo" if world_size > 1 else "")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, limit, backend, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit + 30)
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            logs = [path.read_text() for path in sorted(Path(folder).glob("log*"))]
            raise RuntimeError(f"exit codes {codes}\n" + "\n".join(logs))
        return [torch.load(Path(folder) / f"result{r}", weights_only=False) for r in range(world_size)]
