"""What a run leaves behind.

    run_dir/
      config.yaml     the resolved configuration; written when the first step is about to be made
      metrics.jsonl   one JSON object per line: step, epoch, time, and whatever the trainer logs
      summary.json    the outcome, written when the run is complete
      checkpoints/    the state of the run, to resume from
      teacher/        logits of the full network, to learn from
      store/          the weights of a store in files
      trackers/       files of trackers such as TensorBoard
      model/          the exported network
      members/        the smaller ones of a family

Only the main process records; on the others every method does nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.export import json_values
from offload_sparse.export.json_values import json_value
from offload_sparse.run.checkpoint_files import CHECKPOINT_FOLDER
from offload_sparse.run.teacher import TEACHER_FOLDER
from offload_sparse.run.terminal import Terminal, closing_table, console
from offload_sparse.store.files import remove, sync_folder, write_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "model"
MEMBERS_FOLDER = "members"
TRACKERS_FOLDER = "trackers"

Track = Callable[[dict[str, float], int], None]
"""Receives the finite numbers of a line of metrics, and the step."""

_OUTCOME = (SUMMARY_FILE, MODEL_FOLDER, MEMBERS_FOLDER)
_PARTS = (*_OUTCOME, CHECKPOINT_FOLDER, TRACKERS_FOLDER, TEACHER_FOLDER)
_KNOWN = (CONFIG_FILE, METRICS_FILE, *_PARTS)


class Recorder:
    """Records one run where ``is_main``. A context manager: leaving it closes the files and the progress bar.

    Making one only checks ``run_dir``, so that a folder that cannot serve is known before anything slow
    happens; ``begin`` writes the first files, so that a run that fails before its first step leaves no files
    and costs no earlier run. ``track`` receives every line of metrics too; with ``resumes`` the folder, which
    is there, holds the earlier part of this run. Raises ValueError: ``run_dir`` holds what may not be
    replaced."""

    def __init__(
        self,
        config: RunConfig,
        is_main: bool = True,
        track: Track | None = None,
        resumes: bool = False,
    ) -> None:
        self.config = config
        self.is_main = is_main
        self.track = track
        self.resumes = resumes
        self.terminal = Terminal(config.quiet or not is_main)
        self._metrics: TextIO | None = None
        self._steps_per_epoch = 1
        self._begun = time.monotonic()
        if is_main and not resumes:
            check_run_dir(config.run_dir, config.overwrite)

    def begin(
        self,
        total_steps: int,
        steps_per_epoch: int,
        step: int = 0,
        seconds: float = 0.0,
        origin: str | None = None,
    ) -> None:
        """Begin training after ``step`` steps, which took ``seconds``: write config.yaml, with ``origin`` in
        place of ``resume``, and start the clock behind ``time``.

        An earlier run's files are removed. Where the run resumes, its lines up to ``step`` stay and the later
        ones, which are about to be written again, go; as does its outcome, if it had one. A kill at any
        moment leaves a folder that the same command takes for what it is."""
        self._steps_per_epoch = max(1, steps_per_epoch)
        self._begun = time.monotonic() - seconds
        if self.is_main:
            run_dir = self.config.run_dir
            kept = kept_lines(run_dir / METRICS_FILE, step) if self.resumes else []
            for name in _OUTCOME if self.resumes else _PARTS:
                remove(run_dir / name)
            sync_folder(run_dir)
            written = self.config if origin is None else replace(self.config, resume=origin)
            write_file(run_dir / CONFIG_FILE, arguments.dump(written))
            self._write_lines(kept)
        self.terminal.begin(total_steps, self._steps_per_epoch, step, seconds)

    def logged_at(self, step: int) -> set[str]:
        """The names of all values that the log has of ``step``; empty where nothing is recorded."""
        lines = kept_lines(self.config.run_dir / METRICS_FILE, step) if self.is_main else []
        return {name for line in lines if step_of(line) == step for name in parsed_line(line)}

    def go_back(self, step: int) -> None:
        """After a rollback to ``step``: later lines go, as if they had not been written."""
        self.terminal.go_to(step)
        if self._metrics is not None:
            self._metrics.close()
            self._write_lines(kept_lines(self.config.run_dir / METRICS_FILE, step))

    def sync(self) -> None:
        """Wait until the lines written so far are on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    @property
    def seconds(self) -> float:
        """Time since the run began, over all its parts."""
        return time.monotonic() - self._begun

    def advance(self) -> None:
        self.terminal.advance()

    def log(self, step: int, **values: Any) -> None:
        """Append one line of numbers, text or tensors of one element after ``step`` steps to metrics.jsonl,
        in which NaN and infinities become null. Only after ``begin``."""
        if not self.is_main:
            return
        assert self._metrics is not None, "log() needs begin() before it"
        epoch, seconds = round(step / self._steps_per_epoch, 6), round(self.seconds, 6)
        plain = json_value({"step": step, "epoch": epoch, "time": seconds, **values})
        self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
        self._metrics.flush()
        self.terminal.show(plain)
        if self.track is not None:
            numbers = {key: value for key, value in _flat(plain).items() if key != "step"}
            self.track(numbers, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, complete or not at all, and print the closing table on stdout.

        The last epoch's line has the accuracy of the final network."""
        if not self.is_main:
            return
        plain = json_value(summary)
        write_file(self.config.run_dir / SUMMARY_FILE, json.dumps(plain, indent=2, allow_nan=False) + "\n")
        self.terminal.show({"test_accuracy": plain["test_accuracy"]} if "test_accuracy" in plain else {})
        self.terminal.epoch()
        self.terminal.close()
        console().print(closing_table(summary))
        print(f"run folder: {self.config.run_dir}", flush=True)

    def close(self) -> None:
        """Close the files and the progress bar; may be called again."""
        self.terminal.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_lines(self, lines: list[str]) -> None:
        path = self.config.run_dir / METRICS_FILE
        write_file(path, "".join(line + "\n" for line in lines))
        self._metrics = path.open("a", encoding="utf-8")


def kept_lines(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file that belong to the first ``step`` steps; none if it is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if step_of(line) <= step]


def step_of(line: str) -> float:
    """The step of a line of metrics; infinity for what ``parsed_line`` takes for none."""
    step: float = parsed_line(line).get("step", math.inf)
    return step


def parsed_line(line: str) -> dict[str, Any]:
    """A line of metrics; nothing for half a line (the process is writing it, or died while it did), or what
    no run writes."""
    try:
        value = json_values.parse(line.encode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) and is_number(value.get("step")) else {}


def is_number(value: Any) -> bool:
    """Whether a value of a line can be drawn or compared: one that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_run_dir(run_dir: Path, overwrite: bool) -> None:
    """Make sure that a new run can start in ``run_dir``; nothing in it changes.

    With ``overwrite`` what an earlier run has left may be replaced, and only in a folder whose config.yaml a
    run has written, so that no other ``model`` is ever lost. Raises ValueError: the folder holds files of
    these names that may not be replaced."""
    present = [name for name in _KNOWN if os.path.lexists(run_dir / name)]
    if not present:
        return
    if not _is_of_a_run(run_dir):
        raise ValueError(
            f"run_dir {run_dir} holds {', '.join(present)}, which no complete run left there; "
            "give another folder with --run_dir"
        )
    if not overwrite:
        raise ValueError(
            f"run_dir {run_dir} holds a run already; give another folder with --run_dir, "
            "or replace that run with --overwrite true"
        )


def _is_of_a_run(run_dir: Path) -> bool:
    """Whether a run has left its configuration: beside its metrics, or alone if it was killed in between."""
    path = run_dir / CONFIG_FILE
    if path.is_file() and (run_dir / METRICS_FILE).is_file():
        return True
    try:
        return path.is_file() and arguments.dump(arguments.parse(["--config", str(path)])) == path.read_text()
    except (ValueError, OSError):
        return False


def run_around(path: Path) -> Path | None:
    """The folder of a run that ``path`` is, or lies in (four folders above, at most): by its name, or by
    where links lead. None for none."""
    above = (Path(absolute(path)).parents[:4] for absolute in (os.path.abspath, os.path.realpath))
    folders = (path, *chain.from_iterable(above))
    return next((folder for folder in folders if _is_of_a_run(folder)), None)


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, those of mappings as ``name/entry``."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{name}": number for name, number in _flat(value).items()}
        elif is_number(value):
            numbers[key] = value
    return numbers
