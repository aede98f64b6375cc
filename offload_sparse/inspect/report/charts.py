"""Which figures a page shows, and what each says in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from offload_sparse.inspect.report import figures
from offload_sparse.inspect.report.run_data import AXES, RunData, Series
from offload_sparse.inspect.report.style import Theme

EVALUATED = ("test_accuracy", "validation_accuracy")
LANES = ("gather", "carry", "compute", "scatter")
KINDS = (*LANES, "exchange")


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        name: of its files.
        title: above it.
        caption: what is drawn, for a reader who has not read the code.
        text: what it shows, for a reader who does not see it.
        draw: draws it in a theme.
    """

    name: str
    title: str
    caption: str
    text: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True)
class Section:
    """Figures that belong together; ``missing`` names what no run has recorded."""

    title: str
    charts: tuple[Chart, ...]
    missing: tuple[str, ...]


def sections(runs: Sequence[RunData]) -> list[Section]:
    """All figures that the records of ``runs`` allow, in the order of the page."""
    parts: list[tuple[str, Callable[[Sequence[RunData]], Iterator[Chart | str]]]] = [
        ("Loss and accuracy", _learning),
        ("Structure", _structure),
        ("Memory and transfers", _memory),
        ("Rounds", _rounds),
    ]
    found = []
    for title, charts_of in parts:
        entries = list(charts_of(runs))
        charts = tuple(entry for entry in entries if isinstance(entry, Chart))
        found.append(Section(title, charts, tuple(entry for entry in entries if isinstance(entry, str))))
    return found


def _learning(runs: Sequence[RunData]) -> Iterator[Chart | str]:
    for axis, label in AXES.items():
        yield _curves(
            *(runs, ("loss",), f"loss_{axis}", f"Training loss against {label}", "cross entropy"),
            caption="Mean over the steps between two lines of the log.",
            axis=axis,
        )
    for axis, label in AXES.items():
        yield _curves(
            *(runs, EVALUATED, f"accuracy_{axis}", f"Accuracy against {label}", "accuracy (%)"),
            caption="On the validation images, or on the test images where there are none; the star is the "
            "final network on the test images.",
            axis=axis,
            factor=100,
            outcome="test_accuracy",
        )


def _structure(runs: Sequence[RunData]) -> Iterator[Chart | str]:
    for i, run in enumerate(runs):
        names, epochs, values = run.group_keep
        if not names:
            continue
        title = "Keep ratio per group" if len(runs) == 1 else f"Keep ratio per group: {run.name}"
        yield Chart(
            f"group_keep_{i}",
            title,
            "Mean keep probability of the channels of each group, per epoch.",
            f"{len(names)} groups over {len(epochs)} epochs, at the end from {np.nanmin(values[:, -1]):.2f} "
            f"to {np.nanmax(values[:, -1]):.2f}.",
            _heat_map(title, names, epochs, values),
        )
    if not any(run.group_keep[0] for run in runs):
        yield "keep ratio per group"
    yield _widths(runs)
    curves = [
        ("entropy", "Entropy of the keep probabilities", "bits per channel", "1 is undecided, 0 is decided."),
        ("expected_size", "Expected size of the subnets", "share of channels", "Sum of s over the channels."),
        ("deaths", "Deaths per epoch", "channels", "Channels whose keep probability fell to the floor."),
        ("revivals", "Revivals per epoch", "channels", "Channels whose keep probability rose again."),
        ("mask_overlap", "Overlap of successive masks", "share of channels", "Shared by two rounds' masks."),
        (
            "flops_ratio",
            "Expected FLOPs of the subnets",
            "share of dense",
            "Over the masks of the rounds to come.",
        ),
    ]
    for name, title, label, caption in curves:
        yield _curves(runs, (name,), name, title, label, caption=caption, from_zero=True)
    for name, title in (
        ("loss_difference_mean", "Loss difference of the two subnets: mean"),
        ("loss_difference_std", "Loss difference of the two subnets: deviation"),
    ):
        yield _curves(runs, (name,), name, title, "cross entropy", caption="L(m1) − L(m2), per epoch.")


def _memory(runs: Sequence[RunData]) -> Iterator[Chart | str]:
    rows = {
        "store (rank 0)": "store_bytes",
        "subnets, peak": "subnet_bytes_peak",
        "device, peak": "peak_device_bytes",
        "process, peak": "peak_host_bytes",
    }
    finished = [run for run in runs if run.summary]
    if finished:
        values = {r.name: [float(r.summary.get(key) or np.nan) for key in rows.values()] for r in finished}
        title = "Memory"
        yield Chart(
            *("memory", title),
            "Full weights and optimizer slots in host memory; weights, gradients and slots of the subnets; "
            "what the device and the process held at most.",
            _told({name: f"store {row[0] / 2**20:.1f} MiB" for name, row in values.items()}),
            lambda theme: figures.bars(theme, title, list(rows), values, "bytes", _places(runs)),
        )
    else:
        yield "memory (written when a run is finished)"
    yield _curves(
        *(runs, ("host_bytes",), "host_bytes", "Memory of the process", ""),
        caption="Anonymous memory of rank 0 at the end of each epoch.",
        unit="bytes",
        from_zero=True,
    )
    yield _curves(
        *(runs, ("bus_bytes_per_round",), "bus_bytes", "Bytes over the bus per round", ""),
        caption="Fetched from and returned to the rows of rank 0 in the round before.",
        unit="bytes",
        from_zero=True,
    )


def _rounds(runs: Sequence[RunData]) -> Iterator[Chart | str]:
    drawn = 0
    for i, run in enumerate(runs):
        spans = run.timeline()
        if not spans:
            continue
        drawn += 1
        title = "Timeline of rounds" if len(runs) == 1 else f"Timeline of rounds: {run.name}"
        yield Chart(
            *(f"timeline_{i}", title),
            "Three successive rounds. Gather fetches newcomers from the store, carry copies what stays on "
            "the device, compute is the steps with the reading of their batches, scatter returns leavers. "
            "Gather and scatter beside compute are hidden behind it.",
            f"{len(spans)} pieces of work in {max(end for _, _, end in spans):.3f} s.",
            _timeline(title, spans),
        )
    means = {run.name: [_mean(run.series(f"{kind}_seconds")[1]) for kind in KINDS] for run in runs}
    means = {name: row for name, row in means.items() if np.isfinite(row).any()}
    if not drawn and not means:
        yield "timeline of rounds"
        return
    title = "Seconds of a round"
    yield Chart(
        *("round_seconds", title),
        "Means over the run. Exchange is the time between two rounds in which no step ran: where it is less "
        "than gather, carry and scatter together, the rest of these was hidden behind the steps.",
        _told(
            {
                name: ", ".join(f"{k} {v:.3g} s" for k, v in zip(KINDS, row, strict=True))
                for name, row in means.items()
            }
        ),
        lambda theme: figures.bars(theme, title, list(KINDS), means, "seconds", _places(runs)),
    )


def _curves(
    runs: Sequence[RunData],
    names: Sequence[str],
    file: str,
    title: str,
    label: str,
    *,
    caption: str,
    axis: str = "step",
    factor: float = 1,
    unit: str = "",
    outcome: str = "",
    from_zero: bool = False,
) -> Chart | str:
    """One curve per run that has recorded one of ``names``; what is missing, if none has."""
    found: dict[str, Series] = {}
    ends: dict[str, tuple[float, float]] = {}
    for run in runs:
        x, y = run.series(names, axis)
        result = run.summary.get(outcome) if outcome else None
        if result is not None and (end := _end_of(run, axis)) is not None:
            ends[run.name] = (end, factor * result)
        if len(x) or run.name in ends:
            found[run.name] = (x, factor * y)
    if not found:
        return title[0].lower() + title[1:]
    last = {name: ends[name][1] if name in ends else y[-1] for name, (_, y) in found.items()}
    x_unit = {"train_flops": "FLOP", "time": "seconds"}.get(axis, "")
    x_label = {"train_flops": "training", "time": "time"}.get(axis, "steps")

    def draw(theme: Theme) -> Figure:
        return figures.curves(
            *(theme, title, found, x_label, label),
            x_unit=x_unit,
            y_unit=unit,
            ends=ends,
            places=_places(runs),
            from_zero=from_zero,
        )

    return Chart(
        file, title, caption, _told({name: f"{value:.4g} at the end" for name, value in last.items()}), draw
    )


def _places(runs: Sequence[RunData]) -> dict[str, int]:
    """A run has the same colour in every figure."""
    return {run.name: i for i, run in enumerate(runs)}


def _end_of(run: RunData, axis: str) -> float | None:
    x, _ = run.series("loss", axis)
    return float(x[-1]) if len(x) else None


def _widths(runs: Sequence[RunData]) -> Chart | str:
    """Shares of the channels that the final networks keep."""
    finished = [run for run in runs if run.widths]
    if not finished:
        return "widths of the final network"
    groups = list(dict.fromkeys(group for run in finished for group in run.widths))
    kept = {r.name: [_share(r.widths.get(group)) for group in groups] for r in finished}
    rows = groups
    if len(finished) == 1:
        rows = [f"{group}  {kept_}/{size}" for group, (kept_, size) in finished[0].widths.items()]
    title = "Widths of the final network" if len(finished) == 1 else "Widths of the final networks"
    return Chart(
        *("widths", title),
        "Share of the channels of each group that the exported network keeps.",
        _told(
            {name: f"{np.nanmin(row):.2f} to {np.nanmax(row):.2f} of a group" for name, row in kept.items()}
        ),
        lambda theme: figures.dots(theme, title, rows, kept, "share kept", _places(runs)),
    )


def _heat_map(
    title: str, names: list[str], epochs: np.ndarray, values: np.ndarray
) -> Callable[[Theme], Figure]:
    return lambda theme: figures.heat_map(theme, title, names, epochs, values, "epoch", "keep probability")


def _timeline(title: str, spans: Sequence[tuple[str, float, float]]) -> Callable[[Theme], Figure]:
    return lambda theme: figures.spans(theme, title, LANES, spans)


def _share(width: tuple[int, int] | None) -> float:
    return np.nan if width is None else width[0] / width[1]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _told(facts: dict[str, str]) -> str:
    """What is known of each run, in a sentence."""
    return "; ".join(f"{name}: {fact}" for name, fact in facts.items()) + "."
