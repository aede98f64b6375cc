"""Benches that train many networks: a cell is a run of ``offload-sparse train`` in a folder of its own.

It is started as a user would start it, on one thread. Cut short, it resumes from its checkpoints; finished,
it is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from offload_sparse.bench.options import CellsConfig, SetConfig
from offload_sparse.channels.require import require
from offload_sparse.config import yaml_text
from offload_sparse.run.errors import RunError
from offload_sparse.run.log import CONFIG_FILE
from offload_sparse.run.process import end_with_parent
from offload_sparse.run.resume import same_place
from offload_sparse.run.signals import Interruption
from offload_sparse.run.terminal import columns, tell
from offload_sparse.workloads.config import DataConfig

BATCH = 128
_POLL_SECONDS, _LONGEST_LINE = 0.2, 1 << 16
COMMON: Mapping[str, Any] = {
    "data.batch_size": BATCH,
    "data.random_flip": "true",
    "optim.warmup_epochs": 0.5,
    "round.prefetch": "false",
    "train.check": "false",
}
"""Options of the runs on ``SETS``."""

_CIFAR = {"data.splits": "[train, validation]", "data.random_crop": 4}
SETS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "fashion_mnist": ({"model.name": "offload_sparse/vgg_small", "data.image_size": 14}, 12_000),
    "mobilenetv1": (_CIFAR | {"model.name": "timm/mobilenetv1_100"}, 45_000),
    **{
        name: (_CIFAR | {"model.name": f"offload_sparse/{name}_cifar"}, 45_000)
        for name in ("resnet20", "vgg16", "vgg19")
    },
}
"""Networks with their images: the options that name them, and the images of an epoch."""


def options_on(config: SetConfig) -> dict[str, Any]:
    """Of a run on its set of ``SETS``."""
    options = {**COMMON, **SETS[config.set][0]} | ({"data.name": config.data} if config.data else {})
    return options | ({"train.precision": config.precision} if config.precision != "no" else {})


@contextmanager
def kept(config: CellsConfig) -> Iterator[Path]:
    """The folder of the runs: that of the cache; or one that goes at the end, which is said at the start."""
    if not (config.cache or config.quick):
        tell("the runs are not kept; with --cache FOLDER the same command resumes them")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(config.cache or folder)


@dataclass(frozen=True)
class Run:
    """A run of ``offload-sparse train``: its folder, its options by dotted name, and its ranks, which have
    one thread each, so that several runs can share a machine."""

    folder: Path
    options: Mapping[str, Any]
    ranks: int = 1

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    def check_images(self) -> None:
        """Raise ValueError: it was of other images, of which the folder's name has only the last part."""
        held = yaml_text.read_keys(self.folder / CONFIG_FILE)["data"]["name"]
        asked = self.options.get("data.name", DataConfig.name)
        same = same_place(*(Path(name).expanduser() for name in (held, asked)))
        require(same, f"{self.folder} holds a run on {held}, not on {asked}; give another --cache")

    def start(self) -> subprocess.Popen[bytes]:
        """Begin it, or go on with it. It ends, saved, with this process, however that ends."""
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        threads |= {"ACCELERATE_USE_CPU": "true"} if self.ranks > 1 else {}
        environment, silence = os.environ | threads, subprocess.DEVNULL
        return subprocess.Popen(self.command(), env=environment, stdout=silence, preexec_fn=end_with_parent)

    def command(self) -> list[str]:
        given = {**self.options, "quiet": "true", "trackers": "[]"}
        written = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        started = [*(launcher if self.ranks > 1 else []), "-m", "offload_sparse.cli", "train"]
        return [sys.executable, *started, *written, "--run_dir", str(self.folder)]

    def epoch(self) -> float:
        """How far it is, by the last line of its metrics."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
                return float(json.loads(file.read().splitlines()[-1])["epoch"])
        except (OSError, ValueError, LookupError):  # nothing yet, or a line that is being written
            return 0.0


def finish(runs: Iterable[Run], jobs: int = 1) -> None:
    """Train ``runs`` to the end, in their order and ``jobs`` ranks at a time (but a run at least); those that
    have finished are not run again. Raises RunError: a run ended before it was finished (what it said is on
    stderr), or a signal asked for an end; the others have saved what they have. Raises ValueError: one that
    has finished is of other images."""
    wanted = {run.folder: run for run in runs}.values()
    for run in (run for run in wanted if run.finished):
        run.check_images()
    waiting = [run for run in wanted if not run.finished]
    number = len(waiting)
    running: dict[subprocess.Popen[bytes], Run] = {}
    form = "{bar} {n_fmt}/{total_fmt} runs{postfix}"
    bar = tqdm(total=number, bar_format=form, ncols=columns(), leave=False, disable=None)  # on a terminal
    with bar, Interruption() as asked:
        try:
            while waiting or running:
                busy = sum(run.ranks for run in running.values())
                if waiting and (not running or busy + waiting[0].ranks <= jobs):
                    run = waiting.pop(0)
                    tell(f"run {number - len(waiting)} of {number}: {run.folder.name}")
                    running[run.start()] = run
                    continue
                time.sleep(_POLL_SECONDS)
                if asked.signal_name:
                    raise RunError(f"stopped by {asked.signal_name}; with --cache the same command goes on")
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if process.returncode or not run.finished:
                        raise RunError(f"{run.folder.name} ended too soon; with --cache the bench resumes it")
                    bar.update()
                if not bar.disable:
                    bar.set_postfix_str(", ".join(f"epoch {run.epoch():.1f}" for run in running.values()))
        finally:
            for process in running:
                process.terminate()  # a run saves, and ends
            for process in running:
                process.wait()


def outcome(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the lines of metrics of a run that has finished."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((run.folder / "summary.json").read_text()), [json.loads(line) for line in lines]


def last(lines: Sequence[Mapping[str, Any]], name: str, missing: Any = None) -> Any:
    """The last value of a metric in the lines of a run."""
    return next((line[name] for line in reversed(lines) if name in line), missing)


def accuracy(key: str, percents: Sequence[float]) -> dict[str, float]:
    """The figures of runs of several seeds, by key."""
    return {f"{key}.accuracy": fmean(percents), f"{key}.spread": spread(percents)}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0
