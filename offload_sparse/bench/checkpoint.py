"""What saving costs: the same training with and without background checkpoints of a 2 GB store, in turns.

A pair of stretches has as many steps each; the second one writes a checkpoint in the background, synced to
disk, from its first step on, and is not over before that is complete. What it takes longer is the cost of a
checkpoint, and its share at one checkpoint a minute is that cost over 60 s.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import loss_of, session_of
from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import session_state
from offload_sparse.run.checkpoint import Checkpointer
from offload_sparse.workloads.models import build_model

_MINUTE = 60.0
_BATCH, _K = 16, 10


def run(quick: bool) -> BenchResult:
    """Five pairs on a store of 2 GB; ``quick`` two on one of 0.13 GB."""
    hidden, pairs = (2048, 2) if quick else (32768, 5)
    factory = partial(build_model, "offload_sparse/mlp", 10, 1, 28, stream=1024, hidden=hidden, depth=4)
    session = session_of(factory, (1, 28, 28), 0.25, RoundConfig(k=_K))
    images = torch.randn(_BATCH, 1, 28, 28, device=session.device)
    batch = images, torch.randint(10, (_BATCH,)).to(session.device)
    with tempfile.TemporaryDirectory() as folder:
        config = CheckpointConfig(every="1", keep=1)
        checkpointer = Checkpointer(Path(folder) / "checkpoints", config, {})
        session.transfers.before_return = checkpointer.release
        stretch = partial(_stretch, session, checkpointer, batch)
        stretch(1, _K)  # first times are longer
        # As many steps as a checkpoint is written beside, by the time that it takes alone.
        rounds = 1.5 * stretch(1, 0) / stretch(0, _K)
        steps = _K * max(1, ceil(rounds))
        rows: list[list[Any]] = []
        costs: list[float] = []
        for number in range(pairs):
            plain, saving = stretch(0, steps), stretch(2 + number, steps)
            costs.append(saving - plain)
            rows.append([number, steps, plain, saving, saving - plain])
    cost, size = median(costs), session.store.nbytes
    ratios = {"checkpoint.time_share": cost / _MINUTE}
    raw = {"seconds_per_checkpoint": costs, "steps": steps, "store_bytes": size}
    rows.append([f"store of {size / 1e9:.2f} GB", "", "", "median", cost])
    return BenchResult(ratios, raw, ("pair", "steps", "without s", "with s", "checkpoint s"), rows)


def _stretch(session: SparseOffload, checkpointer: Checkpointer, batch: Any, save: int, steps: int) -> float:
    """Seconds of ``steps`` steps, with the checkpoint ``save`` (0 for none) written beside them."""
    begun = time.perf_counter()
    if save:
        checkpointer.save(save, session_state(session), {})
    for _ in range(steps):
        session.step(partial(loss_of, batch=batch))
    session.records()
    if save and not checkpointer.join():
        raise RuntimeError("the checkpoint could not be written; is the disk full?")
    return time.perf_counter() - begun
