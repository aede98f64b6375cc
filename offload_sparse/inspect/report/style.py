"""How figures look: two themes, colours that colour-blind readers can tell apart, units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, and of the page around it.

    Attributes:
        background, panel: of the page, and of figures and tables on it.
        text, muted, line: of text, of secondary text, and of grids and borders.
        colours: of runs or kinds, in order: apart for every kind of colour vision (Machado et al. 2009), and
            with contrast to ``panel``.
    """

    background: str
    panel: str
    text: str
    muted: str
    line: str
    colours: tuple[str, ...]


_LIGHT = "#0261b8 #d97a0d #08a962 #8e0568 #6d5002 #9b909d #0d0820 #4a0703"
_DARK = "#94bbff #cc5d25 #5fefae #b263a7 #efce29 #8d887b #efe8ff #565de6"
THEMES = {
    "light": Theme("#f4f5f7", "#ffffff", "#1f2328", "#59636e", "#d5dae0", tuple(_LIGHT.split())),
    "dark": Theme("#0e1116", "#171b22", "#e6e9ee", "#9aa4b0", "#343b45", tuple(_DARK.split())),
}

_STYLES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (5, 1, 1, 1, 1, 1)), (0, (1, 2, 4, 2)), (0, (8, 2)), (0, (3, 1, 3, 3))),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")
STYLES = len(_MARKERS)
"""Runs that can be told apart without any colour."""


def look(theme: Theme, index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the run number ``index``: no two of the first eight share any."""
    return {
        "color": theme.colours[index % STYLES],
        "linestyle": _STYLES[index % STYLES],
        "marker": _MARKERS[index % STYLES],
    }


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Matplotlib's settings for figures of this theme."""
    settings: Any = {
        "figure.facecolor": theme.panel,
        "axes.facecolor": theme.panel,
        "savefig.facecolor": theme.panel,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.edgecolor": theme.line,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.formatter.useoffset": False,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,  # names of runs and groups are no formulas
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "hatch.linewidth": 0.8,
        "hatch.color": theme.panel,
        "svg.fonttype": "path",
        "svg.hashsalt": "offload-sparse",
    }
    with mpl.rc_context(settings):
        yield


_LARGE = ("", "k", "M", "G", "T", "P", "E", "Z")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def scale_of(largest: float, unit: str) -> tuple[float, str]:
    """Divisor and name of the unit in which ``largest`` reads well; ``unit`` is bytes, seconds or another,
    which gets a prefix.
    """
    if unit == "bytes":
        power = next((p for p in reversed(range(len(_BYTES))) if largest >= 1024**p), 0)
        return 1024.0**power, _BYTES[power]
    if unit == "seconds":
        return (1e-3, "ms") if largest < 0.5 else (60.0, "minutes") if largest > 600 else (1.0, "seconds")
    power = next((p for p in reversed(range(len(_LARGE))) if largest >= 1000**p), 0)
    return 1000.0**power, f"{_LARGE[power]}{unit}"
