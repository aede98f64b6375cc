"""A small run as a process of its own that leaves everything behind that a run consists of."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.cli.main import main as cli
from offload_sparse.engine.durable import random_state
from offload_sparse.engine.faults import VARIABLE
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.policy import width_search
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run import trainer
from offload_sparse.workloads.data.loader import Batch
from tests.support import fork_server
from tests.support.fork_server import Forked

STEPS = 12
OPTIONS = [
    *("--data.limit", "64", "--data.batch_size", "8"),
    *("--data.random_crop", "2", "--round.k", "3", "--model.name", "offload_sparse/mlp"),
    *("--model.arguments", "{stream: 12, hidden: 24, depth: 1}"),
    *("--round.freeze_at", "0.8", "--train.max_steps", str(STEPS), "--train.log_every", "3"),
    *("--train.check", "false", "--quiet", "true"),
    *("--train.eval_every", "0", "--train.timeout", "60"),
    *("--policy.lr", "0.05", "--optim.lr", "0.02"),
    *("--policy.sampler", "bernoulli", "--policy.estimator", "rloo", "--policy.parametrisation", "atom"),
    *("--policy.optimizer", "adam"),
    *("--checkpoint.every", "2"),
]
_META = ("steps_done", "rounds_done", "forward_flops", "policy_frozen", "round_steps", "round_length")


def main(argv: list[str]) -> int:
    """``FILE ARGUMENTS``: the run of these arguments, with dropout; at its end the state goes to FILE."""
    torch.set_num_threads(1)
    PolicyConfig.cycle_steps = 10
    width_search.PROBE_SHARE = 0.3
    end = trainer.Run.finalize

    def finalize(run: trainer.Run) -> FinalNetwork:
        torch.save(_everything(run), f"{argv[0]}.{os.environ.get('RANK', '0')}")
        return end(run)

    trainer.Run.finalize = finalize  # type: ignore[method-assign]
    trainer.classification_loss = _loss_with_dropout
    return cli(["train", *argv[1:]])


def _loss_with_dropout(module: nn.Module, batch: Batch, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What depends on torch's generator, so that a run that lost its place in it shows."""
    logits = module(F.dropout(batch.images, 0.2))
    return F.cross_entropy(logits, batch.labels), {"accuracy": logits.detach().sum()}


def _everything(run: trainer.Run) -> dict[str, Any]:
    state = run.method.state()
    assert state is not None
    batch = next(run.train_loader.batches(run.progress.data_position))
    tensors = {f"sharded/{n}": s.own.clone() for n, s in state.sharded.items()}
    for part in (state.replicated, state.local):
        tensors |= {n: t.clone() for n, t in part.items()}
    tensors |= {f"random/{n}": t for n, t in random_state().items()}
    tensors |= {"next/images": batch.images, "next/labels": batch.labels}
    session = getattr(run.method, "session", None)
    if session is not None:  # a store in files is no part of the state
        session.settle()
        tensors |= {f"store/{kind}": array.clone() for kind, array in session.store.arrays.items()}
        tensors["s"] = session.policy.s.clone()
    return {"tensors": tensors, "meta": {k: state.meta.get(k) for k in _META}, "step": run.progress.step}


def run(
    folder: Path,
    name: str,
    ranks: int,
    more: list[str],
    fault: str = "",
    hanging: int | None = None,
) -> tuple[list[int], str]:
    """One attempt of the run ``name``.

    Args:
        hanging: rank that never ends; it is killed when the others have.

    Returns:
        how each rank ended, and what they printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = folder / f"{name}.log"
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", VARIABLE)}
    base |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", VARIABLE: fault}
    with log.open("ab") as file:
        before = file.tell()
        processes = [
            start(folder, name, more, base | _places(rank, ranks, port), file.fileno())
            for rank in range(ranks)
        ]
        last = processes[-1 if hanging is None else hanging]
        codes = {process.pid: process.wait(120) for process in processes if process is not last}
        if hanging is not None:
            last.send_signal(signal.SIGKILL)
        codes[last.pid] = last.wait(120)
    return [codes[process.pid] for process in processes], log.read_bytes()[before:].decode()


def start(folder: Path, name: str, more: list[str], environment: Mapping[str, str], output: int) -> Forked:
    arguments = [str(folder / name), *OPTIONS, "--run_dir", str(folder / f"run_{name}"), *more]
    return fork_server.shared().start("tests.run.killed_run:main", arguments, environment, output)


def _places(rank: int, ranks: int, port: str) -> dict[str, str]:
    if ranks == 1:
        return {}
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def left(folder: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    """What the ranks of a run that came to its end have left."""
    return [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(ranks)]
