"""The tables of a page: figures of the runs, the paper's row beside ours, what differs between the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offload_sparse.inspect.report.run_data import RunData
from offload_sparse.run.log import SUMMARY_ROWS

_MORE: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("dataset", "data set", str),
    ("steps", "steps", str),
    ("world_size", "processes", str),
    ("device", "device", str),
    ("test_loss", "test loss", "{:.4g}".format),
    ("store_bytes", "store per rank", lambda size: f"{size / 2**20:.1f} MiB"),
    ("subnet_bytes_peak", "subnets, peak", lambda size: f"{size / 2**20:.1f} MiB"),
)

_PAPER = (
    ("accuracy", "accuracy", "test_accuracy", 100.0, "{:.2f} %"),
    ("params", "parameters kept", "params_ratio", 100.0, "{:.2f} %"),
    ("flops", "FLOPs kept", "flops_ratio", 100.0, "{:.2f} %"),
    ("train_cost_saving", "train-cost saving", "train_cost_saving", 1.0, "{:.2f}×"),
    ("dense_accuracy", "accuracy of the dense network", "", 0.0, "{:.2f} %"),
)

NONE = "–"
_SAID_ELSEWHERE = ("run_dir", "overwrite", "resume")


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names them.

    Attributes:
        title: above it.
        header: titles of the columns.
        rows: cells, as many as there are titles.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary_table(runs: Sequence[RunData]) -> Table:
    """What each run came to; of a run that is not finished, where it stands."""
    rows = []
    for key, label, text in (*SUMMARY_ROWS, *_MORE):
        values = [run.summary.get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append((label, *(NONE if value is None else text(value) for value in values)))
    if any(not run.summary for run in runs):
        states = ["finished" if run.summary else f"at step {run.lines[-1]['step']}" for run in runs]
        rows.insert(0, ("state", *states))
    return Table("Figures", ("", *(run.name for run in runs)), tuple(rows))


def paper_tables(runs: Sequence[RunData]) -> list[Table]:
    """One table for each published row that some run aims at: that row, and the runs beside it."""
    sources = dict.fromkeys(_source(run) for run in runs if _source(run))
    return [_paper_table(source, [run for run in runs if _source(run) == source]) for source in sources]


def difference_table(runs: Sequence[RunData]) -> Table | None:
    """The settings in which the runs differ; None for a single run, or for none."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _SAID_ELSEWHERE)
    rows = []
    for key in keys:
        values = [run.config.get(key, NONE) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, *map(_text, values)))
    return Table("What differs", ("setting", *(run.name for run in runs)), tuple(rows)) if rows else None


def _paper_table(source: str, runs: Sequence[RunData]) -> Table:
    rows = []
    for key, label, ours, factor, form in _PAPER:
        goals = [run.config.get(f"paper.{key}") or 0 for run in runs]
        if not any(goals):
            continue
        goal = form.format(max(goals))
        found = [run.summary.get(ours) for run in runs]
        rows.append((label, goal, *(NONE if v is None else form.format(factor * v) for v in found)))
    return Table(f"Against {source}", ("", "paper", *(run.name for run in runs)), tuple(rows))


def _source(run: RunData) -> str:
    return str(run.config.get("paper.source") or "")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value in ("", [], {}) else str(value)
