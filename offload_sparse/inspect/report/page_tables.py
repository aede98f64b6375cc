"""The tables of a page: figures of the runs, the paper's row beside ours, what differs between the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offload_sparse.inspect.report.run_data import RunData
from offload_sparse.inspect.report.style import scale_of

# What each run came to: key, words, unit, and which end is better (1 the highest, -1 the lowest).
_FIGURES: tuple[tuple[str, str, str, int], ...] = (
    ("method", "method", "", 0),
    ("model", "model", "", 0),
    ("dataset", "data set", "", 0),
    ("knob", "set by", "", 0),
    ("test_accuracy", "test accuracy", "%", 1),
    ("test_loss", "test loss", "", -1),
    ("params_ratio", "parameters kept", "%", 0),
    ("flops_ratio", "FLOPs kept", "%", 0),
    ("train_cost_saving", "train-cost saving", "×", 1),
    ("steps", "steps", "", 0),
    ("seconds", "time", "seconds", -1),
    ("step_seconds_median", "step, median", "seconds", -1),
    ("world_size", "processes", "", 0),
    ("device", "device", "", 0),
    ("store_bytes", "store per rank", "bytes", 0),
    ("subnet_bytes_peak", "subnets, peak", "bytes", -1),
    ("peak_device_bytes", "device, peak", "bytes", -1),
    ("peak_host_bytes", "process, peak", "bytes", -1),
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
        shared: what all columns have in common, said beside the title.
        rows: cells, as many as there are titles.
        best: (row, column) of the cells that are better than the others of their row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    shared: str = ""


def summary_table(runs: Sequence[RunData]) -> Table:
    """What each run came to; of a run that is not finished, where it stands. Rows in which several runs are
    equal are in ``shared``, those that repeat the names of the runs nowhere."""
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    shared = []
    if any(not run.summary for run in runs):
        states = ["finished" if run.summary else f"at step {run.lines[-1]['step']}" for run in runs]
        rows.append(("state", *states))
    for key, label, unit, better in _FIGURES:
        values = [run.summary.get(key) for run in runs]
        if not any(values):
            continue
        label, texts = _texts(label, values, unit)
        if len(runs) > 1 and (len(set(texts)) == 1 or texts == [run.name for run in runs]):
            shared += [f"{label} {texts[0]}"] if len(set(texts)) == 1 else []
            continue
        if better and len(runs) > 1:
            end = max(better * v for v in values if v is not None)
            best |= {(len(rows), i + 1) for i, v in enumerate(values) if v is not None and better * v == end}
        rows.append((label, *texts))
    header = ("", *(run.name for run in runs))
    return Table("Figures", header, tuple(rows), frozenset(best), ", ".join(shared))


def _texts(label: str, values: Sequence[Any], unit: str) -> tuple[str, list[str]]:
    """Name and cells of a row; bytes and seconds all in the unit that suits the largest."""
    numbers = [value for value in values if isinstance(value, int | float)]
    plain = "{:.4g}" if any(isinstance(value, float) for value in numbers) else "{}"
    form = {"%": "{:.2%}", "×": "{:.2f}×"}.get(unit, plain)
    if unit in ("bytes", "seconds"):
        scale, name = scale_of(max(numbers), unit)
        label, form = f"{label} ({name})", "{:.4g}"
        values = [None if value is None else value / scale for value in values]
    return label, [NONE if value is None else form.format(value) for value in values]


def paper_tables(runs: Sequence[RunData]) -> list[Table]:
    """One table for each published row that some run aims at: that row, and the runs beside it. Rows of one
    source differ in their figures."""
    names = ("source", *(key for key, *_ in _PAPER))
    aims: dict[tuple[Any, ...], list[RunData]] = {}
    for run in (run for run in runs if run.config.get("paper.source")):
        aims.setdefault(tuple(run.config.get(f"paper.{name}") for name in names), []).append(run)
    return [_paper_table(source, goals, of) for (source, *goals), of in aims.items()]


def difference_table(runs: Sequence[RunData]) -> Table | None:
    """The settings in which the runs differ; None for a single run, or for none."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _SAID_ELSEWHERE)
    rows = []
    for key in keys:
        values = [run.config.get(key, NONE) for run in runs]
        if any(value != values[0] for value in values) and values != [run.name for run in runs]:
            rows.append((key, *map(_text, values)))
    return Table("What differs", ("setting", *(run.name for run in runs)), tuple(rows)) if rows else None


def _paper_table(source: str, goals: Sequence[Any], runs: Sequence[RunData]) -> Table:
    rows = []
    for (_, label, ours, factor, form), goal in zip(_PAPER, goals, strict=True):
        if not goal:
            continue
        found = [run.summary.get(ours) for run in runs]
        texts = (NONE if v is None else form.format(factor * v) for v in found)
        rows.append((label, form.format(goal), *texts))
    return Table(f"Against {source}", ("", "paper", *(run.name for run in runs)), tuple(rows))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value in ("", [], {}) else str(value)
