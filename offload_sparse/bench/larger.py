"""A store larger than memory: ``offload-sparse train`` on files, killed in its second round, and again; and
one that is filled from a file of weights."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from offload_sparse.bench.cells import Run
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.pretrained import write_zeros
from offload_sparse.run.plan.machine import process_bytes

ROUNDS = 3
LIMIT = 3 * 3600.0
"""Seconds until a process that hangs is stopped."""

_RESUMED = re.compile(r"resuming at step (\d+)")


_COMMON: dict[str, Any] = {
    "model.name": "offload_sparse/mlp",
    "data.name": "fashion_mnist_small",
    "data.batch_size": 64,
    "store.tier": "file",
    "policy.search": "sampled",
    "round.freeze_at": 1,
    "optim.lr": 0.02,
    "optim.schedule": "constant",
    "train.log_every": 1,
}
_QUICK: dict[str, Any] = {
    "model.arguments": {"stream": 512, "hidden": 6144, "depth": 2},
    "round.k": 4,
    "policy.rho": 0.25,
}
_FULL: dict[str, Any] = {
    "model.arguments": {"stream": 4096, "hidden": 65536, "depth": 10},
    "round.k": 20,
    "policy.rho": 0.1,
}


@dataclass
class Part:
    """One process: how it ended, its seconds, the most memory that no file stands behind in bytes, and what
    it printed on stderr."""

    exit_code: int
    seconds: float
    anonymous_peak: int
    messages: str


def resumed_at(messages: str) -> int:
    """The step that a process began at which has printed this."""
    found = _RESUMED.search(messages)
    return int(found[1]) if found else 0


def run(quick: bool) -> BenchResult:
    """Three rounds on real images, killed with SIGKILL in the second and started again by the same command;
    then a step of the same network, whose weights are read from a file (of zeros: it is how much is read).

    ``quick`` takes a store of 100 MB instead of 43 GB. The files lie in the system's folder for temporary
    ones (``TMPDIR``)."""
    options = _COMMON | (_QUICK if quick else _FULL)
    k = int(options["round.k"])
    with tempfile.TemporaryDirectory(prefix="offload-sparse-larger-") as folder:
        run_dir = Path(folder) / "run"
        command = Run(run_dir, options | {"train.max_steps": ROUNDS * k}).command()
        first = watch(command, lambda: k + k // 2 in losses(run_dir))
        killed_after = max(losses(run_dir), default=0)
        second = watch(command)
        found, begun = losses(run_dir), resumed_at(second.messages)
        summary = json.loads((run_dir / "summary.json").read_text())
        shutil.rmtree(run_dir)
        weights = Path(folder) / "weights.safetensors"
        write_zeros(weights, options["model.arguments"] | {"in_channels": 1, "image_size": 28})
        from_file = options | {"model.weights": weights, "train.max_steps": 1}
        loaded = watch(Run(run_dir, from_file).command())
        survived = first.exit_code == -signal.SIGKILL and second.exit_code == 0
        survived &= 0 < begun <= killed_after
        survived &= sorted(found) == list(range(1, ROUNDS * k + 1))
    rounds = [fmean(found[i * k + step] for step in range(1, k + 1)) for i in range(ROUNDS)]
    ratios = {
        "larger.store_gb": summary["store_bytes"] / 1e9,
        "larger.rss_anon_gb": max(first.anonymous_peak, second.anonymous_peak) / 1e9,
        "larger.loading_rss_anon_gb": loaded.anonymous_peak / 1e9,
        "larger.loss_first": rounds[0],
        "larger.loss_last": rounds[-1],
        "larger.survived_kill": float(survived),
    }
    steps = {"killed_after_step": killed_after, "resumed_at_step": begun}
    parts = {"first": vars(first), "second": vars(second), "loaded": vars(loaded)}
    raw = parts | {"loss_by_step": found, "summary": summary} | steps
    rows: list[list[Any]] = [[f"mean loss of round {i}", loss] for i, loss in enumerate(rounds)]
    return BenchResult(ratios, raw, ["", ""], rows)


def watch(command: list[str], enough: Callable[[], bool] = lambda: False) -> Part:
    """Run a command, and kill it as soon as ``enough`` says so. Raises RuntimeError: it takes longer than
    ``LIMIT``, or fails."""
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                peak = max(peak, process_bytes(process.pid))
                if enough():
                    break
                if time.monotonic() - started > LIMIT:
                    raise RuntimeError(f"training did not end within {LIMIT:g} s")
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        part = Part(process.returncode, time.monotonic() - started, peak, errors.read())
    if part.exit_code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"training ended with exit code {part.exit_code}: {part.messages}")
    return part


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step, as far as the run has come; of a step that was made twice, the last."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
