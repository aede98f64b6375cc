"""Whether a run begins, carries on, or is over: what its folder says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.run.launch import rank_and_world_size
from offload_sparse.run.log import CONFIG_FILE, SUMMARY_FILE

Standing = Literal["new", "started", "finished"]

_FREE_SECTIONS = ("checkpoint", "paper")
_FREE = (
    *("run_dir", "overwrite", "resume", "dry_run", "quiet", "trackers"),
    *("train.log_every", "train.eval_every", "train.check", "train.timeout", "train.on_nonfinite"),
    *("round.check_ranks", "data.num_workers"),
)
"""Settings that may change between the parts of a run, because its weights do not depend on them."""


def run_values(config: RunConfig) -> dict[str, Any]:
    """The settings that a run's weights depend on, by dotted name."""
    flat = arguments.flat_tree(config)
    return {k: v for k, v in flat.items() if k not in _FREE and k.split(".")[0] not in _FREE_SECTIONS}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two configurations by dotted name differ, in words; empty if they do not."""
    keys = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    words = [f"{key} {saved.get(key)} instead of {wanted.get(key)}" for key in keys]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def restarted() -> bool:
    """Whether the launcher started this process again after a failure; then the run always carries on."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def standing(config: RunConfig) -> Standing:
    """How the run in ``config.run_dir`` stands; rank 0 looks, and all ranks hear.

    Raises:
        ValueError: the folder holds a run of another configuration (on every rank).
    """
    answer: list[Any] = ["", ""]
    rank, world_size = rank_and_world_size()
    if rank == 0:
        try:
            answer = [_standing(config), ""]
        except ValueError as error:
            answer = ["", str(error)]
    if world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def source_of(config: RunConfig) -> Path | None:
    """The checkpoint or run that ``resume`` names; None for the run's own folder."""
    return None if config.resume in ("auto", "never") else Path(config.resume).expanduser()


def finished_summary(config: RunConfig) -> dict[str, Any]:
    """The summary of a run that is over."""
    summary: dict[str, Any] = json.loads((config.run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def _standing(config: RunConfig) -> Standing:
    source, folder = source_of(config), config.run_dir
    if source is not None and not source.exists():
        raise ValueError(f"resume {source} does not exist; give a run folder, a checkpoint, auto or never")
    if not restarted():
        if config.overwrite or config.resume == "never":
            return "new"
        if source is not None:
            inside = source.resolve().is_relative_to(folder.resolve())
            return "started" if inside else "new"
    if not (folder / CONFIG_FILE).is_file():
        return "new"
    differing = differences(_saved_values(folder / CONFIG_FILE), run_values(config))
    if differing:
        raise ValueError(
            f"run_dir {folder} holds a run already, with {differing}; give another folder with --run_dir, or "
            "replace that run with --overwrite true"
        )
    return "finished" if (folder / SUMMARY_FILE).is_file() else "started"


def _saved_values(path: Path) -> Mapping[str, Any]:
    try:
        return run_values(arguments.parse(["--config", str(path)]))
    except ValueError as error:
        raise ValueError(
            f"{error}; run_dir holds a run already that this version cannot carry on: give another folder "
            "with --run_dir, or replace it with --overwrite true"
        ) from None
