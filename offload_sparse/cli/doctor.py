"""``offload-sparse doctor``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload_sparse.config.parse import PROGRAM, Options

if TYPE_CHECKING:
    from offload_sparse.inspect.doctor import Finding


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


_OPTIONS = Options(
    DoctorConfig,
    f"{PROGRAM} doctor",
    (
        f"{PROGRAM} doctor",
        f"{PROGRAM} doctor --run_dir /scratch/runs --json",
        "accelerate launch --config_file launch/multi_gpu.yaml -m offload_sparse.cli doctor",
    ),
)

_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def doctor(argv: Sequence[str]) -> int:
    """Examine this machine: versions, GPUs, limits, folders, launch; a fix for each finding."""
    config = _OPTIONS.parse(argv)
    from offload_sparse.inspect.doctor import examine

    findings = examine(config.run_dir)
    errors = sum(finding.state == "error" for finding in findings)
    if os.environ.get("RANK", "0") == "0":
        _print(findings, config.json)
    return 1 if errors else 0


def _print(findings: list[Finding], json_wanted: bool) -> None:
    states = {state: sum(finding.state == state for finding in findings) for state in _SIGNS}
    if json_wanted:
        print(json.dumps({"ok": not states["error"], "findings": [asdict(finding) for finding in findings]}))
        return
    for finding in findings:
        print(f"{_SIGNS[finding.state]}  {finding.name}: {finding.found}")
        if finding.fix:
            print(f"{'':<9}fix: {finding.fix}")
    print(f"{states['ok']} ok, {states['warning']} warnings, {states['error']} errors")
