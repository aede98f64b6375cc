"""The network of a checkpoint: what its run would have ended with at that step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.export.network_file import STRUCTURE_FILE
from offload_sparse.run.checkpoint_files import CHECKPOINT_FOLDER, MANIFEST_FILE, CheckpointFolder, Manifest
from offload_sparse.run.log import CONFIG_FILE, MEMBERS_FOLDER, MODEL_FOLDER, run_around
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.source import load_splits


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of a run, such as ``RUN/checkpoints/step_100``."""
    return (path / MANIFEST_FILE).is_file()


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    return run_around(checkpoint) or Path(os.path.abspath(checkpoint)).parent.parent


def _member_of(run: Path | None, share: float, path: Path) -> Path:
    """The folder of a member of the family that a run has trained; ``run`` itself for the largest. Raises
    ValueError: ``path``, which led to the run, leads to no such member; says which there are."""
    config = run / CONFIG_FILE if run is not None else None
    budgets = arguments.parse(["--config", str(config)]).budgets if config else []
    if run is None or share not in budgets:
        known = ", ".join(f"{budget:g}" for budget in budgets) or "none (no policy.budgets)"
        raise ValueError(f"{path} has no member {share:g}; those of the run: {known}")
    return run if share == budgets[-1] else run / MEMBERS_FOLDER / f"{share:g}"


@contextmanager
def exported(path: Path, budget: float = 0.0, data: DataConfig | None = None) -> Iterator[Path]:
    """A folder with the exported network of a checkpoint, which is gone afterwards; another path as it is.
    With a ``budget``, of the member of this share of the family that the run around ``path`` trains; ``data``
    says where the images of the run may be, if they are not where they were.

    The run is set up once more, in a folder of its own and on one process; nothing of it is trained. Raises
    ValueError: the checkpoint is damaged, its run has no ``config.yaml``, or its weights were in the files of
    a store, which has gone on; there is none of this name, or no such member."""
    if not is_checkpoint(path):
        parent = next((f for f in (path, path.parent) if f.name == CHECKPOINT_FOLDER), None)
        if parent is not None and not (path / STRUCTURE_FILE).exists():
            known = ", ".join(found.name for found in CheckpointFolder(parent).checkpoints())
            raise ValueError(f"{path} is no checkpoint; {parent} holds {known or 'none'}")
        yield _member_of(run_around(path), budget, path) if budget else path
        return
    config = arguments.parse(["--config", str(run_of(path) / CONFIG_FILE)])
    store = config.store
    if store.tier != "ram":
        store = replace(store, path=store.path or str(run_of(path) / "store"))
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, check=False)
        images = config.data if data is None else _found(config.data, data)
        again = replace(config, run_dir=Path(folder), store=store, train=train, data=images)
        again = replace(again, trackers=[], quiet=True)
        with redirect_stdout(StringIO()):
            _finalize(again, path)
        yield _member_of(Path(folder), budget, path) if budget else Path(folder) / MODEL_FOLDER


def _found(of_run: DataConfig, data: DataConfig) -> DataConfig:
    """The data section of a run with its places, or those in ``data`` if nothing is there any more."""
    moved = replace(of_run, name=data.name, cache=data.cache, class_map=data.class_map)
    if moved != of_run:
        try:
            load_splits(of_run)
        except ValueError:
            return moved
    return of_run


def _finalize(config: RunConfig, checkpoint: Path) -> None:
    from offload_sparse.run.launch import launched
    from offload_sparse.run.resume import Start
    from offload_sparse.run.teacher import TEACHER_FOLDER
    from offload_sparse.run.trainer import Run

    with launched(config) as accelerator:
        run = Run(config, accelerator, Start("look", checkpoint))
        with run.recorder:
            progress = run.progress  # not entered: nothing is to be saved, and a signal ends this at once
            progress.begin(run.total_steps, run.steps_per_epoch)
            step = Manifest.read(checkpoint).step
            if progress.step != step:  # only a store in files can be elsewhere
                raise ValueError(
                    f"{checkpoint} is of step {step}, and its weights are in files that have gone on to step "
                    f"{progress.step}; take the newest checkpoint, or the run when it is finished"
                )
            teacher = run_of(checkpoint) / TEACHER_FOLDER
            if run.teacher is not None and teacher.is_dir():  # which a search that is not over chooses by
                (config.run_dir / TEACHER_FOLDER).symlink_to(teacher)
            run.finalize()
