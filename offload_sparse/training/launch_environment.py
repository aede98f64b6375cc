"""From the launcher's environment to an ``Accelerator``, with every mismatch made an error at the start."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_sparse.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer means that a rank is gone."""

TWO_CPU_RANKS = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 launch/train.py --config …"
)


def check_environment(environment: dict[str, str] | None = None) -> None:
    """Refuse launches whose processes would each train alone.

    ``accelerate launch --cpu --num_processes 2`` starts one process, and leaves nothing but MASTER_ADDR to
    tell; a process started by MPI or Slurm without a rendezvous knows its rank only from variables that torch
    does not read.

    Raises:
        ValueError: the launcher wanted several ranks, but they cannot find each other; says what to run.
    """
    env = dict(os.environ) if environment is None else environment
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if int(env["WORLD_SIZE"]) > 1 and missing:
            raise ValueError(
                f"WORLD_SIZE is {env['WORLD_SIZE']}, but {missing[0]} is not set; use accelerate launch"
            )
        return
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        raise ValueError(
            "several processes were asked for, but this one was started alone (no WORLD_SIZE); "
            f"on CPU start two ranks with: {TWO_CPU_RANKS}"
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(env.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {env[name]}, but the ranks have no rendezvous (no WORLD_SIZE); "
                "start one accelerate launch per node instead"
            )


def start(config: TrainConfig, run_dir: Path, trackers: list[str]) -> Accelerator:
    """The accelerator of this process.

    Raises:
        ValueError: ranks do not find each other, or the device cannot do what is asked.
    """
    check_environment()
    from accelerate import Accelerator, InitProcessGroupKwargs

    if config.precision == "bf16" and config.dtype == "float64":
        raise ValueError("train.precision bf16 and train.dtype float64 exclude each other; choose one")
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=not torch.cuda.is_available(),
        log_with=trackers or None,
        project_dir=str(run_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"the launcher started {expected} processes, but accelerate sees {accelerator.num_processes}; "
            f"on CPU start two ranks with: {TWO_CPU_RANKS}"
        )
    return accelerator
