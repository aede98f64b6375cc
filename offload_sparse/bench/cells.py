"""Benches that train many networks: a cell is a run of ``offload-sparse train`` in a folder of its own.

Cut short, it resumes from its checkpoints; finished, it is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from offload_sparse.run.errors import RunError


def finished_run(
    run_dir: Path, options: Mapping[str, Any], ranks: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the lines of metrics of a run with ``options`` by dotted name, which is started, or
    resumed, if it has not finished; a thread for each of ``ranks``, so that several can share a machine.
    Raises RunError: it ended before it was finished; what it said is on stderr."""
    summary = run_dir / "summary.json"
    if not summary.exists():
        written = [text for name, value in options.items() for text in (f"--{name}", str(value))]
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


def spread(values: Sequence[float]) -> float:
    """Standard deviation over runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0
