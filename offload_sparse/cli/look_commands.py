"""The commands that look at machines, runs and the project's figures: ``doctor``, ``report``, ``bench``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload_sparse.bench.options import BenchConfig, options_of
from offload_sparse.config.parse import PROGRAM, Options


@dataclass
class DoctorConfig:
    """Look at versions, GPUs, memory limits, folders and the launch, and say what to change.

    The exit code is 1 if there is an error, 0 otherwise.

    Attributes:
        run_dir: where runs would be written.
        json: print one JSON object instead of lines.
    """

    run_dir: Path = Path("runs")
    json: bool = False


_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def doctor(argv: Sequence[str]) -> int:
    """Examine this machine: versions, GPUs, limits, folders, launch; a fix for each finding."""
    examples = (
        f"{PROGRAM} doctor",
        f"{PROGRAM} doctor --run_dir /scratch/runs --json",
        "accelerate launch --config_file launch/multi_gpu.yaml -m offload_sparse.cli doctor",
    )
    config = Options(DoctorConfig, f"{PROGRAM} doctor", examples).parse(argv)
    from offload_sparse.inspect.doctor import examine

    findings = examine(config.run_dir)
    if os.environ.get("RANK", "0") == "0":
        _print(findings, config.json)
    return 1 if any(finding.state == "error" for finding in findings) else 0


def _print(findings: Sequence[Any], json_wanted: bool) -> None:
    states = {state: sum(finding.state == state for finding in findings) for state in _SIGNS}
    if json_wanted:
        print(json.dumps({"ok": not states["error"], "findings": [asdict(finding) for finding in findings]}))
        return
    from offload_sparse.run.terminal import fitted

    for finding in findings:
        print(fitted(f"{_SIGNS[finding.state]}  {finding.name}: {finding.found}", f"{'':<11}"))
        if finding.fix:
            print(fitted(f"{'':<9}fix: {finding.fix}"))
    print(f"{states['ok']} ok, {states['warning']} warnings, {states['error']} errors")


@dataclass
class ReportConfig:
    """Draw what one or several runs have recorded on one HTML page, and as PNG files.

    The page holds its pictures and needs no other file, no script and no network. Runs that are not finished
    can be drawn, too.

    Attributes:
        runs: folders of the runs.
        output: folder to write report.html and pictures/ to; empty takes ``report`` in the folder of a single
            run, or beside those of several.
    """

    runs: list[str] = field(default_factory=list)
    output: str = ""


def report(argv: Sequence[str]) -> int:
    """Draw runs on one HTML page: losses, structure, memory, rounds, and the paper's figures beside ours."""
    examples = (
        f"{PROGRAM} report runs/quickstart",
        f"{PROGRAM} report runs/quickstart runs/static runs/dense --output comparison",
    )
    config = Options(ReportConfig, f"{PROGRAM} report", examples, positional="runs").parse(argv)
    if not config.runs:
        raise ValueError(f"RUNS is missing; try: {examples[0]}")
    from offload_sparse.inspect.report.page import write_report
    from offload_sparse.inspect.report.run_data import read_runs

    runs = read_runs(Path(run) for run in config.runs)
    first = runs[0].folder
    default = first / "report" if len(runs) == 1 else first.resolve().parent / "report"
    print(write_report(runs, Path(config.output).expanduser() if config.output else default))
    return 0


def bench(argv: Sequence[str]) -> int:
    """Measure one of the figures that the README quotes, or list them."""
    examples = (
        f"{PROGRAM} bench",
        f"{PROGRAM} bench memory --json memory.json",
        f"{PROGRAM} bench peers --help",
    )
    config = Options(options_of(argv), f"{PROGRAM} bench", examples, positional="name").parse(argv)
    from offload_sparse.bench import contract
    from offload_sparse.run.terminal import fitted

    if not config.name:
        for name, line in contract.available().items():
            print(fitted(f"{name:<16}{line}", f"{'':<16}"))
        return 0
    run = contract.load(config.name)
    result = run(config.quick if type(config) is BenchConfig else config)
    contract.print_result(result, config.name)
    if config.json:
        contract.write(result, shlex.join([PROGRAM, "bench", *argv]), Path(config.json))
    return 0
