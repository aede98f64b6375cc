"""``offload-sparse report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload_sparse.config.parse import PROGRAM, Options


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

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"RUN is missing; try: {PROGRAM} report runs/quickstart")


_OPTIONS = Options(
    ReportConfig,
    f"{PROGRAM} report",
    (
        f"{PROGRAM} report runs/quickstart",
        f"{PROGRAM} report runs/quickstart runs/static runs/dense --output comparison",
    ),
    positional=("runs",),
)


def report(argv: Sequence[str]) -> int:
    """Draw runs on one HTML page: losses, structure, memory, rounds, and the paper's figures beside ours."""
    config = _OPTIONS.parse(argv)
    from offload_sparse.inspect.report.page import write_report
    from offload_sparse.inspect.report.run_data import read_runs

    runs = read_runs(Path(run) for run in config.runs)
    first = runs[0].folder
    default = first / "report" if len(runs) == 1 else first.resolve().parent / "report"
    print(write_report(runs, Path(config.output).expanduser() if config.output else default))
    return 0
