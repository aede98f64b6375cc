"""Benches that train many networks: a cell is a run of ``offload-sparse train`` in a folder of its own.

Cut short, it resumes from its checkpoints; finished, it is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from offload_sparse.run.errors import RunError

BATCH = 128
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


def options_on(name: str, data: str) -> dict[str, Any]:
    """Of a run on a set of ``SETS``, whose images are ``data`` (empty: the embedded ones). Raises ValueError:
    there are no images."""
    if not data and name != "fashion_mnist":
        raise ValueError(f"--set {name} needs images; give a folder of them with --data")
    return {**COMMON, **SETS[name][0]} | ({"data.name": data} if data else {})


def finished_run(
    run_dir: Path, options: Callable[[], Mapping[str, Any]], ranks: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the lines of metrics of a run with ``options`` by dotted name, which is started, or
    resumed, if it has not finished; a thread for each of ``ranks``, so that several can share a machine.
    Raises RunError: it ended before it was finished; what it said is on stderr."""
    summary = run_dir / "summary.json"
    if not summary.exists():
        given = {**options(), "quiet": "true", "trackers": "[]"}
        written = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        started = [*(launcher if ranks > 1 else []), "-m", "offload_sparse.cli", "train"]
        command = [sys.executable, *started, *written, "--run_dir", str(run_dir)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        threads |= {"ACCELERATE_USE_CPU": "true"} if ranks > 1 else {}
        done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.DEVNULL)
        if done.returncode or not summary.exists():
            raise RunError(f"{run_dir.name} has not finished; the same command resumes it")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(summary.read_text()), [json.loads(line) for line in lines]


def last(lines: Sequence[Mapping[str, Any]], name: str, missing: Any = None) -> Any:
    """The last value of a metric in the lines of a run."""
    return next((line[name] for line in reversed(lines) if name in line), missing)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0
