"""``offload-sparse train``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.store.lock import lock_folder


def train(argv: Sequence[str]) -> int:
    """Train a network as a configuration says; the same as launch/train.py."""
    config = arguments.parse(argv)
    if config.dry_run:
        return _dry_run(config)
    # Before anything slow is imported: a folder that is in use is known at once.
    first = os.environ.get("RANK", "0") == "0"
    with lock_folder(config.run_dir) if first else nullcontext():
        from offload_sparse.run.trainer import train as run

        run(config)
    return 0


def _dry_run(config: RunConfig) -> int:
    from rich.console import Console

    from offload_sparse.run.plan.dry_run import dry_run, dry_run_table

    table = dry_run_table(dry_run(config))
    if os.environ.get("RANK", "0") == "0":
        Console().print(table)
    return 0
