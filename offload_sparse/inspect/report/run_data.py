"""What a run has left in its folder, as series and tables."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_sparse.config import yaml_text
from offload_sparse.export import json_values
from offload_sparse.export.network_file import STRUCTURE_FILE, Structure, read_structure
from offload_sparse.run.log import (
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    SUMMARY_FILE,
    is_number,
    parsed_line,
)

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y of a curve, both [points]."""

PAGE_FILE = "report.html"

AXES = {"step": "steps", "train_flops": "training FLOPs", "time": "seconds"}
"""What curves are drawn against, by its name in the metrics."""


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: short and unlike the names of the other runs on the page.
        config: resolved configuration, by dotted name.
        summary: contents of summary.json; empty for a run that is not finished.
        structure: of its exported network, if there is one."""

    name: str
    folder: Path
    config: dict[str, Any]
    lines: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    structure: Structure | None

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Per group the channels kept and those there were; empty without an exported network."""
        groups = self.structure.groups if self.structure else {}
        return {name: (len(channels.kept), channels.size) for name, channels in groups.items()}

    def series(self, names: str | Iterable[str], axis: str = "step") -> Series:
        """The curve of the first of ``names`` that the run has recorded, against ``axis``; lines without it
        are left out, those without ``axis`` are placed by their step.
        """
        for name in [names] if isinstance(names, str) else names:
            found = [line for line in self.lines if is_number(line.get(name))]
            if found:
                x = self._along(axis, np.array([line["step"] for line in found], dtype=np.float64))
                y = np.array([line[name] for line in found], dtype=np.float64)
                known = np.isfinite(x)
                return x[known], y[known]
        return np.empty(0), np.empty(0)

    def timeline(self) -> list[tuple[str, float, float]]:
        """The (lane, start, end) of successive rounds: of those recorded, the ones that moved most; empty
        without any.
        """
        recorded = [line["round_timeline"] for line in self.lines if line.get("round_timeline")]
        return max(recorded, key=lambda spans: sum(lane != "compute" for lane, _, _ in spans), default=[])

    @cached_property
    def group_keep(self) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
        """Names of the groups, epochs [E], and the mean keep probability float[groups, E]."""
        found = [line for line in self.lines if isinstance(line.get("group_keep"), dict)]
        if not found:
            return [], np.empty(0), np.empty((0, 0))
        names = list(found[-1]["group_keep"])
        values = [[line["group_keep"].get(name, np.nan) for name in names] for line in found]
        epochs = np.array([line["epoch"] for line in found], dtype=np.float64)
        return names, epochs, np.array(values, dtype=np.float64).T

    @cached_property
    def probes(self) -> list[dict[str, list[float]]]:
        """What each probe of a search by cycles has found, per group (see ``WidthSearch.history``)."""
        found = [line["probes"] for line in self.lines if isinstance(line.get("probes"), list)]
        return found[-1] if found else []

    def _along(self, axis: str, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where on ``axis`` the run was after ``steps``."""
        if axis == "step":
            return steps
        known = [(line["step"], line[axis]) for line in self.lines if is_number(line.get(axis))]
        if not known:
            return np.full_like(steps, np.nan)
        x, y = np.array(known, dtype=np.float64).T
        return np.interp(steps, x, y)


def read_runs(folders: Iterable[Path]) -> list[RunData]:
    """The runs in ``folders``, with names that tell them apart; folders of earlier reports are passed over.
    Raises ValueError: a folder holds no run, or a file in it cannot be read."""
    paths = [folder.expanduser() for folder in folders]
    runs = [p for p in paths if (p / METRICS_FILE).is_file() or not (p / PAGE_FILE).is_file()]
    paths = runs or paths
    resolved = [Path(os.path.realpath(path)) for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is given twice; give each run once")
    return [_read(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    """As many of the last parts of each path as make it unlike the others."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths are unlike each other")


def _read(folder: Path, name: str) -> RunData:
    if not (folder / METRICS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds no run ({CONFIG_FILE} and {METRICS_FILE}); give a run's folder")
    config = _flat(yaml_text.read_keys(folder / CONFIG_FILE))
    text = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    lines = tuple(filter(None, map(parsed_line, text.splitlines())))
    if not lines:
        raise ValueError(f"{folder / METRICS_FILE} holds no lines yet; wait until the run has logged some")
    network = folder / MODEL_FOLDER
    structure = read_structure(network) if (network / STRUCTURE_FILE).is_file() else None
    return RunData(name, folder, config, lines, _summary(folder / SUMMARY_FILE), structure)


def _summary(path: Path) -> dict[str, Any]:
    """What the run came to; nothing as long as it trains."""
    try:
        return json_values.read(path, dict[str, Any])
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or finish the run again") from None


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
