"""What a person sees of a run: a bar of 80 columns, lines of at most 100, a table at the end; nothing splits
a line.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

_COLUMNS, _LINE = 80, 100
_WARM_UP = 3
"""Steps whose seconds say nothing of those that follow."""

_PERCENT = ("accuracy", "validation_accuracy", "test_accuracy")
_SHOWN = ("loss", *_PERCENT)

_COLLAPSED = 0.01
_LESS_PRUNING = {
    "dense": "train for more epochs",
    "dst": "lower dst.alpha",
    "dfbst": "lower dst.alpha",
}
"""By method; every other one, of the user's own too, goes by policy.rho."""

SUMMARY_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("method", "method", str),
    ("model", "model", str),
    ("knob", "set by", str),
    ("test_accuracy", "test accuracy", "{:.2%}".format),
    ("params_ratio", "parameters kept", "{:.2%}".format),
    ("flops_ratio", "FLOPs kept", "{:.2%}".format),
    ("train_cost_saving", "train-cost saving", "{:.2f}x".format),
    ("seconds", "seconds", "{:.1f}".format),
    ("step_seconds_median", "step median", lambda seconds: f"{1000 * seconds:.2f} ms"),
    ("peak_host_bytes", "peak host memory", lambda size: f"{size / 2**20:.1f} MiB"),
    ("peak_device_bytes", "peak device memory", lambda size: f"{size / 2**20:.1f} MiB"),
)


class Terminal:
    """Shows how a run stands on stderr, unless ``quiet``: one line per epoch and, on a terminal, a bar below.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._redirected = ExitStack()
        self._values: dict[str, Any] = {}
        self._total = self._step = self._made = self._epochs_told = 0
        self._per_epoch = 1
        self._began = self._started = self._warm = self._last = 0.0

    def begin(self, total_steps: int, steps_per_epoch: int, step: int, seconds: float) -> None:
        """The run is at ``step`` of ``total_steps``, which took ``seconds`` so far."""
        self._total, self._per_epoch = total_steps, steps_per_epoch
        self._step, self._made = step, 0
        self._warm = self._last = self._started = time.monotonic()
        self._began = self._started - seconds
        self._epochs_told = step // steps_per_epoch
        if not self._quiet and sys.stderr.isatty():
            form = "{bar} {n_fmt}/{total_fmt}{postfix}"
            self._redirected.enter_context(logging_redirect_tqdm())
            logging.captureWarnings(True)
            self._redirected.callback(logging.captureWarnings, False)
            width = min(_COLUMNS, columns())
            self._bar = tqdm(
                total=total_steps, initial=step, ncols=width, bar_format=form, file=sys.stderr, leave=False
            )

    def advance(self) -> None:
        self.epoch()
        self._step += 1
        self._made += 1
        self._last = time.monotonic()
        if self._made == _WARM_UP:
            self._warm = self._last
        if self._bar is not None:
            self._bar.set_postfix_str(self._words(on_bar=True), refresh=False)
            self._bar.update()

    def go_to(self, step: int) -> None:
        """The run is at another step."""
        self._step = step
        if self._bar is not None:
            self._bar.n = step

    def show(self, values: Mapping[str, Any]) -> None:
        """These figures from now on, on the bar and with the epoch; None is a number that is not finite."""
        self._values |= {name: values[name] for name in _SHOWN if name in values}

    def epoch(self) -> None:
        """Tell of the epoch that is over, once: a line that begins with ``epoch``.

        An epoch is told when the next one starts, so that its evaluation is in the line; accuracies of an
        evaluation are not told again."""
        number = math.ceil(self._step / self._per_epoch)
        over = self._step % self._per_epoch == 0 or self._step == self._total
        if self._quiet or not over or number <= self._epochs_told:
            return
        self._epochs_told = number
        epochs = math.ceil(self._total / self._per_epoch)
        elapsed = tqdm.format_interval(time.monotonic() - self._began)
        words, left = self._words(), f"left {self._left()}"
        whole = f"epoch {number}/{epochs} step {self._step} {words}".rstrip()
        forms = (f"{whole} elapsed {elapsed} {left}", f"{whole} {left}")
        short = fitted(f"epoch {number}/{epochs} {words} {left}")
        line = next((form for form in forms if len(form) <= columns()), short)
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
        for name in _PERCENT[1:]:
            self._values.pop(name, None)

    def close(self) -> None:
        """Take the bar away; may be called again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirected.close()

    def _left(self) -> str:
        """The time that the rest will take, by the steps of this process."""
        made, since = self._made, self._started
        if made > _WARM_UP:
            made, since = made - _WARM_UP, self._warm
        per_step = (self._last - since) / max(1, made)
        return tqdm.format_interval(per_step * (self._total - self._step))

    def _words(self, on_bar: bool = False) -> str:
        """The figures; on the bar those of the training alone, and the time left."""
        names = [name for name in (_SHOWN[:2] if on_bar else _SHOWN) if name in self._values]
        words = [f"{name.removesuffix('_accuracy')} {_text(name, self._values[name])}" for name in names]
        return ", ".join([*words, f"{self._left()} left"]) if on_bar else " ".join(words)


def warn_of_collapse(method: str, params_ratio: float, one_class: bool) -> None:
    """Say that a network is as good as gone, and which setting to change."""
    change = _LESS_PRUNING.get(method, "raise policy.rho")
    if params_ratio < _COLLAPSED:
        logger.warning("only %.2g%% of the weights are left; %s", 100 * params_ratio, change)
    if one_class:
        logger.warning("the network takes every image for the same class; %s, or lower optim.lr", change)


def tell(*lines: str) -> None:
    """Print lines on stderr, above a bar if there is one."""
    for line in lines:
        tqdm.write(fitted(line), file=sys.stderr)
    sys.stderr.flush()


def fitted(line: str, indent: str = "  ") -> str:
    """``line`` in as many lines of ``columns()`` as it takes, all but the first indented; a word stays
    whole."""
    first = line[: len(line) - len(line.lstrip())]
    form = textwrap.TextWrapper(
        columns(), first, first + indent, break_long_words=False, break_on_hyphens=False
    )
    return form.fill(line.strip())


def columns() -> int:
    """Of a line: those of the terminal, and at most 100."""
    return min(_LINE, shutil.get_terminal_size((_LINE, 24)).columns)


def console() -> Console:
    """Where tables are printed: stdout. Names in them are text, whatever brackets and colons they have."""
    return Console(width=columns(), markup=False, emoji=False)


def closing_table(summary: Mapping[str, Any]) -> Table:
    """The table that closes a run; quantities that the summary lacks, or that are None, are left out, and the
    memory of a device that there is not."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for key, label, text in SUMMARY_ROWS:
        if summary.get(key) or (summary.get(key) == 0 and key != "peak_device_bytes"):
            table.add_row(label, text(summary[key]))
    for share, member in summary.get("members", {}).items():
        accuracy, kept = 100 * member["test_accuracy"], 100 * member["params_ratio"]
        table.add_row(f"member {share}", f"{accuracy:.2f} %, {kept:.2f} % of the parameters")
    return table


def _text(name: str, value: Any) -> str:
    if value is None:
        return "nan"
    return f"{100 * value:.1f}%" if name in _PERCENT else f"{value:.4g}"
