"""What a run leaves behind and what it shows while it runs.

    run_dir/
      config.yaml     the resolved configuration
      metrics.jsonl   one JSON object per line: step, epoch, time, and whatever the trainer logs
      summary.json    the outcome, written when the run is complete
      checkpoints/    the state of the run, to carry on from
      trackers/       files of trackers such as TensorBoard
  model/          the exported network (written by the engine)

Only the main process records; on the others every method does nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.export.json_values import json_value
from offload_sparse.run.checkpoint_files import CHECKPOINT_FOLDER
from offload_sparse.run.trackers import TRACKERS_FOLDER

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "model"

Track = Callable[[dict[str, float], int], None]
"""Receives the finite numbers of a line of metrics, and the step."""

_SHOWN = ("loss", "accuracy", "validation_accuracy", "test_accuracy", "expected_size", "entropy")
_KNOWN = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, MODEL_FOLDER, CHECKPOINT_FOLDER, TRACKERS_FOLDER)


class Recorder:
    """Records one run. A context manager: leaving it closes the files and the progress bar.

    Making one only checks ``run_dir``, so that a folder that cannot serve is known before anything slow
    happens; ``begin`` writes the first files, so that a run that fails before its first step leaves no files
    and costs no earlier run.

    Args:
        config: configuration of the run.
        is_main: whether this is the process that records.
        track: receives every line of metrics too, for accelerate's trackers.
        carries_on: ``run_dir`` holds the earlier part of this run.

    Raises:
        ValueError: ``run_dir`` cannot be written, or holds a run already and ``overwrite`` is off.
    """

    def __init__(
        self,
        config: RunConfig,
        is_main: bool = True,
        track: Track | None = None,
        carries_on: bool = False,
    ) -> None:
        self.config = config
        self.is_main = is_main
        self.track = track
        self._bar: tqdm[Any] | None = None
        self._metrics: TextIO | None = None
        self._total_steps = 0
        self._steps_per_epoch = 1
        self._step = 0
        self._epochs_told = 0
        self._latest: dict[str, Any] = {}
        self._begun = self._began_here = time.monotonic()
        self._first_step = 0
        self.carries_on = carries_on
        if is_main:
            check_writable(config.run_dir)
            if not carries_on:
                check_run_dir(config.run_dir, config.overwrite)

    @property
    def model_folder(self) -> Path:
        """Where the exported network belongs."""
        return self.config.run_dir / MODEL_FOLDER

    def begin(self, total_steps: int, steps_per_epoch: int, step: int = 0, seconds: float = 0.0) -> None:
        """Begin training: write config.yaml, start the clock behind ``time``.

        An earlier run's files are removed. Where the run carries on, its lines up to ``step`` stay and the
        later ones, which are about to be written again, go.

        While training, stderr shows one line per epoch and, on a terminal, a progress bar below, unless
        ``quiet`` is on.

        Args:
            total_steps: optimizer steps of the run.
            steps_per_epoch: optimizer steps of an epoch.
            step: steps that are done already.
            seconds: time that they took.
        """
        self._total_steps, self._steps_per_epoch = total_steps, max(1, steps_per_epoch)
        self._begun = time.monotonic() - seconds
        self._step = self._first_step = step
        self._began_here = time.monotonic()
        self._epochs_told = step // self._steps_per_epoch
        if not self.is_main:
            return
        run_dir = self.config.run_dir
        kept = kept_lines(run_dir / METRICS_FILE, step) if self.carries_on else []
        for name in _KNOWN if not self.carries_on else (SUMMARY_FILE, MODEL_FOLDER):
            _remove(run_dir / name)
        if not (run_dir / CONFIG_FILE).is_file():
            _write_whole(run_dir / CONFIG_FILE, arguments.dump(self.config))
        _write_whole(run_dir / METRICS_FILE, "".join(line + "\n" for line in kept))
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        if not self.config.quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def go_back(self, step: int) -> None:
        """After a rollback to ``step``: later lines go, as if they had not been written."""
        self._step = step
        if self._bar is not None:
            self._bar.n = step
        if self._metrics is not None:
            self._metrics.close()
            path = self.config.run_dir / METRICS_FILE
            _write_whole(path, "".join(line + "\n" for line in kept_lines(path, step)))
            self._metrics = path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Wait until the lines written so far are on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    @property
    def seconds(self) -> float:
        """Time since the run began, over all its parts."""
        return time.monotonic() - self._begun

    def advance(self) -> None:
        """One more optimizer step is done."""
        # An epoch is told when the next one starts, so that its evaluation is in the line.
        if self._step and self._step % self._steps_per_epoch == 0:
            self._tell_epoch()
        self._step += 1
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl, in which NaN and infinities become null. Only after ``begin``.

        Loss, accuracies, expected size and entropy of s are shown from then on, on the bar or with the epoch.

        Args:
            step: optimizer steps done.
            values: numbers, text or tensors of one element.
        """
        if not self.is_main:
            return
        assert self._metrics is not None, "log() needs begin() before it"
        line = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 6),
            "time": round(self.seconds, 6),
            **values,
        }
        plain = json_value(line)
        self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
        self._metrics.flush()
        self._latest |= {name: plain[name] for name in _SHOWN if name in plain}
        if self._bar is not None:
            self._bar.set_postfix_str(_words(self._latest, ", ", "="), refresh=False)
        if self.track is not None:
            numbers = {key: value for key, value in _flat(plain).items() if key != "step"}
            self.track(numbers, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, complete or not at all, and print the closing table on stdout."""
        if not self.is_main:
            return
        self._tell_epoch()
        self._close_bar()
        text = json.dumps(json_value(summary), indent=2, allow_nan=False) + "\n"
        _write_whole(self.config.run_dir / SUMMARY_FILE, text)
        Console().print(closing_table(summary))
        print(f"run folder: {self.config.run_dir}", flush=True)

    def close(self) -> None:
        """Close the files and the progress bar; may be called again."""
        self._close_bar()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell_epoch(self) -> None:
        """Print how the run stands, once per epoch: a line that begins with ``epoch``."""
        epoch = math.ceil(self._step / self._steps_per_epoch)
        quiet = not self.is_main or self.config.quiet
        if quiet or epoch == self._epochs_told:
            return
        self._epochs_told = epoch
        epochs = math.ceil(self._total_steps / self._steps_per_epoch)
        shown = _words(self._latest, " ", " ")
        per_step = (time.monotonic() - self._began_here) / max(1, self._step - self._first_step)
        left = per_step * (self._total_steps - self._step)
        line = f"epoch {epoch}/{epochs} step {self._step} {shown}".rstrip()
        line += f" elapsed {tqdm.format_interval(self.seconds)} left {tqdm.format_interval(left)}"
        tqdm.write(line, file=sys.stderr)  # which keeps a bar below
        sys.stderr.flush()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def kept_lines(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file that belong to the first ``step`` steps."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if _step_of(line) <= step]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the process died while it wrote


def check_writable(run_dir: Path) -> None:
    """Make sure that files can be written in ``run_dir``; the folder is created.

    Raises:
        ValueError: they cannot.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"run_dir {run_dir} cannot be written ({reason}); give another folder with --run_dir"
        raise ValueError(message) from error


def check_run_dir(run_dir: Path, overwrite: bool) -> None:
    """Make sure that a new run can start in ``run_dir``; nothing in it changes.

    With ``overwrite`` the files of an earlier run may be replaced: config.yaml, metrics.jsonl, summary.json,
    model/ and checkpoints/, and only in a folder with both of the first two, so that no other ``model`` is
    ever lost.

    Raises:
        ValueError: the folder holds files of these names that may not be replaced.
    """
    present = [name for name in _KNOWN if os.path.lexists(run_dir / name)]
    if present:
        _check_replaceable(run_dir, present, overwrite)


def _check_replaceable(run_dir: Path, present: list[str], overwrite: bool) -> None:
    if not (run_dir / CONFIG_FILE).is_file() or not (run_dir / METRICS_FILE).is_file():
        raise ValueError(
            f"run_dir {run_dir} holds {', '.join(present)}, which no complete run left there; "
            "give another folder with --run_dir"
        )
    if not overwrite:
        raise ValueError(
            f"run_dir {run_dir} holds a run already; give another folder with --run_dir, "
            "or replace that run with --overwrite true"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either complete or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, those of mappings as ``name/entry``."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{name}": number for name, number in _flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[key] = value
    return numbers


def _words(values: Mapping[str, Any], between: str, equals: str) -> str:
    return between.join(f"{name}{equals}{_short(json_value(value))}" for name, value in values.items())


def _short(value: Any) -> str:
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


SUMMARY_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("method", "method", str),
    ("model", "model", str),
    ("rho", "rho", "{:.4g}".format),
    ("test_accuracy", "test accuracy", "{:.2%}".format),
    ("params_ratio", "parameters kept", "{:.2%}".format),
    ("flops_ratio", "FLOPs kept", "{:.2%}".format),
    ("train_cost_saving", "train-cost saving", "{:.2f}x".format),
    ("seconds", "seconds", "{:.1f}".format),
    ("step_seconds_median", "step median", lambda seconds: f"{1000 * seconds:.2f} ms"),
    ("peak_host_bytes", "peak host memory", lambda size: f"{size / 2**20:.1f} MiB"),
    ("peak_device_bytes", "peak device memory", lambda size: f"{size / 2**20:.1f} MiB"),
)


def closing_table(summary: Mapping[str, Any]) -> Table:
    """The table that closes a run; quantities that the summary lacks, or that are None, are left out."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for key, label, text in SUMMARY_ROWS:
        if summary.get(key) is not None:
            table.add_row(label, text(summary[key]))
    return table
