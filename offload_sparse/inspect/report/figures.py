"""The kinds of figures: curves, heat map, dots, estimates, bars, spans. Each draws a new figure, in the
settings of ``style.themed``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from offload_sparse.inspect.report.run_data import Series
from offload_sparse.inspect.report.style import HATCHES, STYLES, Theme, look, scale_of

SIZE = (4.8, 3.3)
"""Inches; drawn 360 pixels wide on a telephone, 10 points of text are 10 pixels there."""

_MOST_POINTS = 300
_MOST_LABELS = 40
_LONGEST_NAME = 26
_LONGEST_TITLE = 44


def curves(
    series: Mapping[str, Series],
    x_label: str,
    y_label: str,
    *,
    theme: Theme,
    title: str,
    places: Mapping[str, int],
    x_unit: str = "",
    y_unit: str = "",
    ends: Mapping[str, tuple[float, float]] | None = None,
    from_zero: bool = False,
) -> Figure:
    """One line per entry; a long one is averaged over neighbouring points.

    Args:
        series: by the name of the run or kind.
        places: which colour each entry has, so that a run keeps its own in all figures.
        x_unit, y_unit: ``bytes``, ``seconds`` or a unit that takes prefixes; empty draws plain numbers.
        ends: a further point (x, y) of some entries, drawn as a large mark of theirs: the outcome.
        from_zero: begin the y axis at 0.
    """
    figure, axes = _panel(title)
    ends = ends or {}
    lasts = [np.array([at]) for at, _ in ends.values()]
    x_scale, x_label = _scaled(x_label, x_unit, [*(x for x, _ in series.values()), *lasts])
    y_scale, y_label = _scaled(y_label, y_unit, [y for _, y in series.values()])
    drawn = {}
    for name, (x, y) in series.items():
        x, y = _thinned(x, y)
        style = look(theme, places[name])
        line = style | {"marker": ""} if len(x) > 40 else style
        [drawn[name]] = axes.plot(x / x_scale, y / y_scale, **line)
        if name in ends:
            at, value = ends[name]
            mark = style | {"linestyle": "", "markersize": 9, "zorder": 5}
            mark |= {"markeredgecolor": theme.text, "markeredgewidth": 0.9}
            axes.plot([at / x_scale], [value / y_scale], **mark)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=not x_unit))
    axes.margins(x=0.02)
    if from_zero:
        highest = max((float(y.max()) for _, y in series.values() if len(y)), default=0.0)
        axes.set_ylim(0, 1.08 * highest / y_scale or 1.0)
    _legend(figure, drawn)
    return figure


def heat_map(
    rows: Sequence[str],
    x: NDArray[np.float64],
    values: NDArray[np.float64],
    x_label: str,
    value_label: str,
    *,
    theme: Theme,
    title: str,
) -> Figure:
    """Values [rows, x] as colours, the first row on top; the colours span at least 0.1."""
    figure, axes = _panel(title, (SIZE[0], _height(len(rows))))
    axes.grid(False)
    edges = _edges(x)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.0, 0.1 - (high - low)) / 2
    mesh = axes.pcolormesh(
        *(edges, np.arange(len(rows) + 1), values),
        cmap="cividis",
        vmin=low - margin,
        vmax=high + margin,
        rasterized=True,
    )
    _name_rows(axes, rows, 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel=x_label)
    bar = figure.colorbar(mesh, ax=axes, label=value_label, fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_edgecolor(theme.line)
    return figure


def dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    places: Mapping[str, int],
    *,
    theme: Theme,
    title: str,
) -> Figure:
    """A share in [0, 1] per row; NaN draws nothing. One entry gets lines from zero, several a row of dots."""
    figure, axes = _panel(title, (SIZE[0], _height(len(rows))))
    heights, drawn = np.arange(len(rows)), {}
    for name, shares in series.items():
        style = look(theme, places[name])
        if len(series) == 1:
            axes.hlines(heights, 0, shares, color=style["color"], linewidth=2)
        mark = {"linestyle": "", "color": style["color"], "marker": style["marker"]}
        [drawn[name]] = axes.plot(shares, heights, **mark)
    _name_rows(axes, rows)
    axes.set(xlabel=x_label, xlim=(0, 1.02))
    axes.grid(axis="y", visible=len(series) > 1)
    _legend(figure, drawn)
    return figure


def estimates(
    rows: Sequence[str], series: Mapping[str, Series], x_label: str, *, theme: Theme, title: str
) -> Figure:
    """A value per row with its standard error, for each entry (values and errors, both [rows])."""
    apart = 0.8 / len(series)
    figure, axes = _panel(title, (SIZE[0], max(_height(len(rows)), 1.0 + 0.07 * len(rows) * len(series))))
    axes.axvline(0, color=theme.line, linewidth=1)
    drawn = {}
    for i, (name, (values, errors)) in enumerate(series.items()):
        heights = np.arange(len(rows)) + (i - (len(series) - 1) / 2) * apart
        style = look(theme, i) | {"linestyle": "", "markersize": 3}
        drawn[name] = axes.errorbar(values, heights, xerr=errors, elinewidth=1, **style)
    _name_rows(axes, rows)
    axes.set(xlabel=x_label)
    _legend(figure, drawn)
    return figure


def bars(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str,
    places: Mapping[str, int],
    *,
    theme: Theme,
    title: str,
) -> Figure:
    """Horizontal bars with their values written out, one colour per entry."""
    thickness = 0.8 / len(series)
    figure, axes = _panel(title, (SIZE[0], max(SIZE[1], 0.9 + 0.3 * len(rows) * len(series))))
    values = np.array(list(series.values()), dtype=np.float64)
    scale, label = _scaled("", unit, [values])
    drawn = {}
    for i, (name, row) in enumerate(zip(series, values / scale, strict=True)):
        heights = np.arange(len(rows)) + (i - (len(series) - 1) / 2) * thickness
        place = places[name] % STYLES
        fill: dict[str, Any] = {"color": theme.colours[place], "hatch": HATCHES[place], "linewidth": 0}
        drawn[name] = axes.barh(heights, np.nan_to_num(row), thickness * 0.9, **fill)
        texts = [f"{value:.3g}" if np.isfinite(value) else "" for value in row]
        axes.bar_label(drawn[name], texts, padding=4, fontsize=9, color=theme.text)
    _name_rows(axes, rows)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label)
    axes.margins(x=0.18)
    _legend(figure, drawn)
    return figure


def spans(
    lanes: Sequence[str], found: Sequence[tuple[str, float, float]], *, theme: Theme, title: str
) -> Figure:
    """Work over time: one lane per kind, a bar from start to end (in seconds) of each piece."""
    figure, axes = _panel(title, (SIZE[0], 2.6))
    scale, label = _scaled("", "seconds", [np.array([end for _, _, end in found])])
    whole = max(end for _, _, end in found) / scale
    for i, lane in enumerate(lanes):
        pieces = [(start / scale, (end - start) / scale) for name, start, end in found if name == lane]
        colour = theme.colours[i % len(theme.colours)]
        # A piece that is thinner than a pixel still shows its edge; neighbours are kept apart.
        edges = [colour if length < 0.01 * whole else theme.panel for _, length in pieces]
        axes.broken_barh(pieces, (i - 0.36, 0.72), facecolors=colour, edgecolors=edges, linewidth=0.8)
    _name_rows(axes, lanes)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label)
    axes.margins(x=0.01)
    return figure


def _panel(title: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, _LONGEST_TITLE))
    return figure, axes


def _legend(figure: Figure, drawn: Mapping[str, Any]) -> None:
    """Of what was drawn, by name: below the panel, where it hides nothing; none for a single entry."""
    names = list(map(_short, drawn))
    if len(names) < 2:
        return
    columns = max(1, min(len(names), 52 // (max(map(len, names)) + 7)))
    figure.legend(list(drawn.values()), names, loc="outside lower center", ncols=columns, handlelength=2.6)


def _scaled(label: str, unit: str, arrays: Sequence[NDArray[np.float64]]) -> tuple[float, str]:
    """The divisor of an axis, and its label with the unit."""
    if not unit:
        return 1.0, label
    largest = max((float(np.nanmax(a)) for a in arrays if a.size and np.isfinite(a).any()), default=0.0)
    scale, name = scale_of(largest, unit)
    return scale, f"{label} ({name})" if label else name


def in_bytes(value: float) -> str:
    """A number of bytes for a sentence."""
    scale, name = scale_of(value, "bytes")
    return f"{value / scale:.3g} {name}"


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Series:
    """At most ``_MOST_POINTS`` points, each the mean of its neighbours."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _edges(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borders [n + 1] of columns that end at each of ``x`` [n]."""
    width = float(np.diff(x).mean()) if len(x) > 1 else max(1.0, float(x[0]))
    return np.concatenate([[x[0] - width], x])


def _height(rows: int) -> float:
    return min(max(SIZE[1], 1.0 + 0.19 * rows), 9.0)


def _name_rows(axes: Axes, rows: Sequence[str], offset: float = 0.0) -> None:
    """Names of the rows, the first on top; of many, every second, third, … so that none overlap."""
    every = -(-len(rows) // _MOST_LABELS)
    names, places = list(map(_short, rows[::every])), np.arange(0, len(rows), every) + offset
    axes.set_yticks(places, names, fontsize=9 if len(rows) <= 20 else 7)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME + 1 :]}"
