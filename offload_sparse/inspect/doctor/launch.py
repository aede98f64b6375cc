"""The launcher's environment: whether the processes of a run would find each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from offload_sparse.config import yaml_text
from offload_sparse.inspect.doctor.finding import Finding
from offload_sparse.run.launch import TWO_CPU_RANKS, check_environment


def check_launch(environment: dict[str, str] | None = None) -> Iterator[Finding]:
    """The variables of this process, and accelerate's configuration file."""
    env = dict(os.environ) if environment is None else environment
    yield _processes(env)
    yield _threads(env)
    yield _accelerate_file(env)


def _processes(env: dict[str, str]) -> Finding:
    try:
        check_environment(env)
    except ValueError as error:
        found, _, fix = str(error).partition("; ")
        return Finding("launch", "error", found, fix or TWO_CPU_RANKS)
    world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Finding("launch", "ok", "one process")
    from accelerate import PartialState

    seen = PartialState(cpu=not torch.cuda.is_available()).num_processes
    found = f"{world_size} processes by the launcher, {seen} by accelerate"
    if seen == world_size:
        return Finding("launch", "ok", found)
    return Finding("launch", "error", found, f"on CPU start two ranks with: {TWO_CPU_RANKS}")


def _threads(env: dict[str, str]) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(env.get("LOCAL_WORLD_SIZE", "1"))
    threads = torch.get_num_threads()
    found = f"{threads} per process, {ranks} processes, {cores} cores"
    if threads * ranks <= cores:
        return Finding("threads", "ok", found)
    return Finding("threads", "warning", found, f"export OMP_NUM_THREADS={max(1, cores // ranks)}")


def _accelerate_file(env: dict[str, str]) -> Finding:
    """``accelerate launch`` without --config_file reads this one."""
    home = Path(env.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = home / "accelerate" / "default_config.yaml"
    if not path.is_file():
        return Finding("accelerate's default file", "ok", "none; options and --config_file decide")
    try:
        content: dict[Any, Any] = yaml_text.read_keys(path)
        wanted = int(content.get("num_processes", 1))
    except (ValueError, TypeError) as error:
        return Finding("accelerate's default file", "error", str(error), f"remove {path}")
    devices = torch.cuda.device_count()
    found = f"{path}: {wanted} processes, {content.get('distributed_type', 'NO')}"
    if devices and wanted > devices * int(content.get("num_machines", 1)):
        fix = f"this machine has {devices} GPUs: give --num_processes {devices}, or change the file"
        return Finding("accelerate's default file", "warning", found, fix)
    return Finding("accelerate's default file", "ok", found)
