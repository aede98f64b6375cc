"""Whether a run begins, resumes, or is over: what its folder says.

The same command resumes, whatever way the run was started: ``config.yaml``, which is written when the first
step is about to be made, remembers the checkpoint that the run was started from. A command that names it
again goes on from where the folder is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.config.yaml_text import shortened as shown
from offload_sparse.engine.distributed import on_first_rank
from offload_sparse.export import json_values
from offload_sparse.export.description import file_digest
from offload_sparse.export.network_file import WEIGHTS_FILE, read_structure
from offload_sparse.run.log import CONFIG_FILE, MODEL_FOLDER, SUMMARY_FILE

_FREE_SECTIONS = ("checkpoint", "paper")
_FREE = (
    *("run_dir", "overwrite", "resume", "dry_run", "quiet", "trackers"),
    *("train.log_every", "train.eval_every", "train.check", "train.timeout", "train.on_nonfinite"),
    *("round.transfer", "store.pin", "data.num_workers", "data.declared"),
)
"""Settings that may change between the parts of a run, because its weights do not depend on them."""

_LENGTH = ("train.epochs", "train.max_steps")
"""Settings that may grow."""

_SEARCH = ("policy.search", "round.freeze_at")
"""Settings that only methods with a search know; earlier versions wrote other ones down for the rest."""

PLACES = ("data.name", "data.cache", "data.class_map")
"""Settings that say where the images of a run are; which images these are is compared by themselves."""

_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Start:
    """How a run begins in its folder.

    Attributes:
        status: ``new``, ``started`` (there is an earlier part), ``finished``, or ``look``: nothing is
            trained, and weights in files stay as they are.
        source: the checkpoint or run to start from where the folder has no checkpoint of its own.
        goes_back: ``source`` is a checkpoint of this run, and what came after it is dropped.
        moved: in words, where the images were and are, if that is not the same."""

    status: Literal["new", "started", "finished", "look"]
    source: Path | None = None
    goes_back: bool = False
    moved: str = ""


def run_values(config: RunConfig) -> dict[str, Any]:
    """The settings that a run's weights depend on, by dotted name."""
    flat = arguments.flat_tree(config)
    return {k: v for k, v in flat.items() if k not in _FREE and k.split(".")[0] not in _FREE_SECTIONS}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """How the settings of a run differ from those that it was begun with, in words; empty if it can go on. A
    ``free`` one may name another place, but not none."""
    names = (saved.keys() | wanted.keys()).difference(_FREE)  # of which earlier versions wrote some down
    keys = sorted(name for name in names if saved.get(name) != wanted.get(name))
    keys = [key for key in keys if key not in free or not (saved.get(key) and wanted.get(key))]
    (unit, before), (same_unit, now) = _length(saved), _length(wanted)
    if unit == same_unit and now >= before:
        keys = [key for key in keys if key not in _LENGTH]
    if wanted.get("method") not in ("sparse_offload", "grow_efficient"):
        keys = [key for key in keys if key not in _SEARCH]
    words = [f"{shown(k)} {shown(saved.get(k))} instead of {shown(wanted.get(k))}" for k in keys]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def restarted() -> bool:
    """Whether the launcher started this process again after a failure, or Slurm a job that was requeued; then
    the run always resumes."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTARTS)


def again(config: RunConfig) -> str:
    """How a run that did not come to its end is taken up, in words."""
    options = ["--overwrite true (which starts anew)"] if config.overwrite else []
    options += ["--resume never"] if config.resume == "never" else []
    without = f" without {' and '.join(options)}" if options else ""
    return f"the same command{without} resumes"


def start_of(config: RunConfig) -> Start:
    """How the run in ``config.run_dir`` begins; rank 0 looks, and all ranks hear. Raises ValueError: the
    folder holds a run of another configuration (on every rank)."""
    return on_first_rank(lambda: _start_of(config))


def finished_summary(config: RunConfig) -> dict[str, Any]:
    return json_values.read(config.run_dir / SUMMARY_FILE, dict[str, Any])


def _start_of(config: RunConfig) -> Start:
    folder = config.run_dir
    named = _place(config.resume)
    inside = named is not None and any(same_place(above, folder) for above in (named, *named.parents))
    if not (folder / CONFIG_FILE).is_file():
        return Start("new", _existing(named))
    if config.overwrite and inside:
        raise ValueError(f"overwrite true would remove what resume {named} names; leave out one of the two")
    if (config.resume == "never" or config.overwrite) and not restarted():
        return Start("new", _existing(named))
    saved = _saved(folder / CONFIG_FILE)
    source = _place(saved.resume)
    before, now = run_values(saved), run_values(config)
    differing = differences(before, now, PLACES)
    moved = "" if differing else differences(before, now)
    if moved and _length(now) == _length(before) and _is_whole(folder):
        differing = moved  # finished: nothing shows which images it was trained on
    is_older = config.overwrite and (differing or moved or (folder / SUMMARY_FILE).is_file())
    if is_older or (config.resume == "never" != saved.resume):
        return Start("new", _existing(named))  # the attempt that was restarted had not begun
    begun_from_it = named is None or (source is not None and same_place(named, source))
    if not begun_from_it:
        _existing(named)
    if differing or (not begun_from_it and not inside):
        what = f", with {differing}" if differing else f" that was not begun from {named}"
        raise ValueError(
            f"run_dir {folder} holds a run already{what}; give another folder with --run_dir, or "
            "replace that run with --overwrite true"
        )
    if not begun_from_it and not same_place(named, folder):  # type: ignore[arg-type]
        return Start("started", named, goes_back=True, moved=moved)
    if _length(now) == _length(before) and _is_whole(folder):
        return Start("finished")
    return Start("started", source, moved=moved)


def _place(resume: str) -> Path | None:
    """The run or checkpoint that the setting names, the same from every working directory; or None."""
    return None if resume in ("auto", "never") else Path(os.path.expanduser(resume)).absolute()


def _existing(named: Path | None) -> Path | None:
    """What the setting names. Raises ValueError: it is not there."""
    if named is not None and not named.exists():
        raise ValueError(f"resume {named} does not exist; give a run folder, a checkpoint, auto or never")
    return named


def same_place(a: Path, b: Path) -> bool:
    """Whether two paths, which may lead through links, lead to one place; it may be empty."""
    return os.path.realpath(a) == os.path.realpath(b)


def _is_whole(folder: Path) -> bool:
    """Whether the summary and the network that it is about are there, undamaged."""
    model = folder / MODEL_FOLDER
    try:
        json_values.read(folder / SUMMARY_FILE, dict[str, Any])
        return read_structure(model).weights_digest in ("", file_digest(model / WEIGHTS_FILE))
    except (OSError, ValueError):
        return False


def _length(values: Mapping[str, Any]) -> tuple[bool, int]:
    """Of a run: whether it is counted in steps, and in these or in epochs."""
    epochs, steps = (int(values.get(name) or 0) for name in _LENGTH)
    return (steps > 0, steps or epochs)


def _saved(path: Path) -> RunConfig:
    try:
        return arguments.parse(["--config", str(path)])
    except ValueError as error:
        raise ValueError(
            f"{error}; run_dir holds a run already that this version cannot resume: give another folder "
            "with --run_dir, or replace it with --overwrite true"
        ) from None
