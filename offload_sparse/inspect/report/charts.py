"""Which figures a page shows, and what each says in words. What no run has recorded is not drawn, nor curves
of which each says one number throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from offload_sparse.inspect.report import figures
from offload_sparse.inspect.report.memory import ROWS, planned_memory
from offload_sparse.inspect.report.run_data import AXES, RunData, Series
from offload_sparse.inspect.report.style import Theme

EVALUATED = ("test_accuracy", "validation_accuracy")
LANES = ("gather", "carry", "compute", "scatter")
KINDS = (*LANES, "exchange")

# Curves of the structure over the run: the quantity, its title, its unit, and what it is.
_STRUCTURE = (
    ("entropy", "Entropy of the keep probabilities", "bits per channel", "1 is undecided, 0 is decided."),
    ("expected_size", "Expected size of the subnets", "share of channels", "Sum of s over the channels."),
    ("deaths", "Deaths per epoch", "channels", "Channels whose keep probability fell to the floor."),
    ("revivals", "Revivals per epoch", "channels", "Channels whose keep probability rose again."),
    ("mask_overlap", "Overlap of successive masks", "share of channels", "Shared by two rounds' masks."),
    ("flops_ratio", "Expected FLOPs of the subnets", "share of dense", "Over the masks of the next rounds."),
    ("loss_difference_mean", "Loss difference of the subnets: mean", "cross entropy", "L(m1) − L(m2)."),
    ("loss_difference_std", "Loss difference of the subnets: deviation", "cross entropy", "L(m1) − L(m2)."),
)
_EQUAL = 1e-3
_SEEN = 0.05
"""Share of an axis from zero by which a curve has to move to be worth drawing."""

_UNKNOWN = 1e4
"""An error of so many times the smallest is that of a group whose channels no pair has dropped."""

_MOST_DENSE = 3
_SIGNED = "loss_difference_mean"
_X_AXES = {"step": ("steps", ""), "train_flops": ("training", "FLOP"), "time": ("time", "seconds")}


@dataclass(frozen=True)
class Chart:
    """A figure of the page: the name of its files, what is drawn, for a reader who has not read the code
    (``caption``), what it shows, for one who does not see it (``text``), and its kind, with all that is to be
    drawn but the title."""

    name: str
    title: str
    caption: str
    text: str
    kind: Callable[..., Figure]

    def draw(self, theme: Theme) -> Figure:
        return self.kind(theme=theme, title=self.title)


def sections(runs: Sequence[RunData]) -> dict[str, list[Chart]]:
    """All figures that the records of ``runs`` allow, by the title of their section, in the order of the
    page."""
    parts = {
        "Loss and accuracy": _learning(runs),
        "Structure": _structure(runs),
        "Memory and transfers": _memory(runs),
        "Rounds": _rounds(runs),
    }
    found = {title: [chart for chart in charts if chart is not None] for title, charts in parts.items()}
    return {title: charts for title, charts in found.items() if charts}


def _learning(runs: Sequence[RunData]) -> Iterator[Chart | None]:
    for axis, label in AXES.items():
        caption = "Mean over the steps between two lines of the log."
        title = f"Training loss against {label}"
        yield _curves(runs, ("loss",), f"loss_{axis}", title, "cross entropy", caption, axis=axis)
    for axis, label in AXES.items():
        caption = "On the validation images, or else the test images; large: the final network on these."
        title, accuracy = f"Accuracy against {label}", partial(_curves, factor=100, outcome="test_accuracy")
        yield accuracy(runs, EVALUATED, f"accuracy_{axis}", title, "accuracy (%)", caption, axis=axis)


def _families(runs: Sequence[RunData]) -> Chart | None:
    """What the members of families cost, and what they are worth."""
    found = {}
    for run in runs:
        members = [*run.summary.get("members", {}).values(), run.summary]
        if len(members) > 1:
            points = np.array([[100 * m["flops_ratio"], 100 * m["test_accuracy"]] for m in members])
            found[run.name] = (points[:, 0], points[:, 1])
    if not found:
        return None
    return Chart(
        "members",
        "Accuracy of the members",
        "Networks that one run has trained as parts of one another.",
        _told({name: _pairs(*points) for name, points in found.items()}),
        partial(figures.curves, found, "FLOPs (% of dense)", "accuracy (%)", places=_places(runs)),
    )


def _structure(runs: Sequence[RunData]) -> Iterator[Chart | None]:
    yield _families(runs)
    for i, run in enumerate(runs):
        names, epochs, values = run.group_keep
        if run.probes:
            yield from _search(run, runs, i, names)
            continue
        if not names or np.max(np.nanmax(values, 1) - np.nanmin(values, 1)) < _EQUAL:
            continue  # a picture of what never moved
        low, high = np.nanmin(values[:, -1]), np.nanmax(values[:, -1])
        yield Chart(
            f"group_keep_{i}",
            _titled("Keep ratio per group", run, runs),
            "Mean keep probability of the channels of each group, per epoch.",
            f"{len(names)} groups over {len(epochs)} epochs, at the end from {low:.2f} to {high:.2f}.",
            partial(figures.heat_map, names, epochs, values, "epoch", "keep probability"),
        )
    yield _widths(runs)
    for name, title, label, caption in _STRUCTURE:
        yield _curves(runs, (name,), name, title, label, caption, from_zero=name != _SIGNED)


def _memory(runs: Sequence[RunData]) -> Iterator[Chart | None]:
    plans = {run.name: plan for run in runs if (plan := planned_memory(run))}
    if plans:
        values = {name: ours for name, (ours, _) in plans.items()}
        dense: dict[tuple[float, ...], list[str]] = {}
        for name, (_, beside) in plans.items():
            dense.setdefault(tuple(beside), []).append(name)
        if len(dense) > _MOST_DENSE:
            dense = {}
        for row, names in dense.items():
            several = f"dense for {names[0]}{' …' if len(names) > 1 else ''}"
            values["dense, planned" if len(dense) == 1 else several] = list(row)
        places = _places(runs) | {name: len(runs) + i for i, name in enumerate(list(values)[len(plans) :])}
        yield Chart(
            "memory",
            "Memory of a rank, as planned",
            "What the network takes, without the libraries: weights and optimizer slots in host memory, "
            "subnets with their gradients and slots, activations of a step"
            + ("; beside them what training the dense network on the device would take." if dense else "."),
            _told({name: ", ".join(map(figures.in_bytes, row)) for name, row in values.items()}),
            partial(figures.bars, ROWS, values, "bytes", places),
        )
    caption = "Anonymous memory of rank 0 at the end of each epoch, with the libraries."
    unit = partial(_curves, unit="bytes", from_zero=True)
    yield unit(runs, ("host_bytes",), "host_bytes", "Memory of the process", "", caption)
    caption = "Fetched from and returned to the rows of rank 0 in the round before."
    yield unit(runs, ("bus_bytes_per_round",), "bus_bytes", "Bytes over the bus per round", "", caption)


def _rounds(runs: Sequence[RunData]) -> Iterator[Chart | None]:
    for i, run in enumerate(runs):
        spans = run.timeline()
        if all(lane == "compute" for lane, _, _ in spans):
            continue  # nothing was moved, or nothing recorded
        yield Chart(
            f"timeline_{i}",
            _titled("Timeline of rounds", run, runs),
            "Three successive rounds. Gather fetches from the store, carry copies what stays on the device, "
            "compute is the steps with the reading of their batches, scatter returns what is evicted. Gather "
            "and scatter beside compute are hidden behind it.",
            f"{len(spans)} pieces of work in {max(end for _, _, end in spans):.3f} s.",
            partial(figures.spans, LANES, spans),
        )
    means = {run.name: [_mean(run.series(f"{kind}_seconds")[1]) for kind in KINDS] for run in runs}
    means = {name: row for name, row in means.items() if np.isfinite(row).any()}
    if means:
        texts = {name: ", ".join(f"{value:.3g} s" for value in row) for name, row in means.items()}
        yield Chart(
            "round_seconds",
            "Time of a round",
            "Means over the run. Exchange is the time between two rounds in which no step ran: what gather, "
            "carry and scatter take beyond it was hidden behind the steps.",
            _told(texts),
            partial(figures.bars, KINDS, means, "seconds", _places(runs)),
        )


def _curves(
    runs: Sequence[RunData],
    names: Sequence[str],
    file: str,
    title: str,
    label: str,
    caption: str,
    *,
    axis: str = "step",
    factor: float = 1,
    unit: str = "",
    outcome: str = "",
    from_zero: bool = False,
) -> Chart | None:
    """One curve per run that has recorded one of ``names``; None if none has, or none is seen to move."""
    found: dict[str, Series] = {}
    ends: dict[str, tuple[float, float]] = {}
    for run in runs:
        x, y = run.series(names, axis)
        result, steps = run.summary.get(outcome), run.series("loss", axis)[0]
        if result is not None and len(steps):
            ends[run.name] = (float(steps[-1]), factor * result)
        if len(x) or run.name in ends:
            found[run.name] = (x, factor * y)
    seen = _SEEN * max((float(abs(y).max()) for _, y in found.values() if len(y)), default=0.0)
    moves = max((float(np.ptp(y)) for _, y in found.values() if len(y)), default=0.0)
    if not ends and moves <= (seen if from_zero else 1e-6 * seen):
        return None
    if not any(len(y) for _, y in found.values()) and (axis != "train_flops" or len(ends) < 2):
        return None  # outcomes alone say something of several runs, beside what they took
    last = {name: ends[name][1] if name in ends else y[-1] for name, (_, y) in found.items()}

    x_label, x_unit = _X_AXES[axis]
    told = _told({name: f"{value:.4g} at the end" for name, value in last.items()})
    kind = partial(figures.curves, x_unit=x_unit, y_unit=unit, from_zero=from_zero, places=_places(runs))
    return Chart(file, title, caption, told, partial(kind, found, x_label, label, ends=ends))


def _widths(runs: Sequence[RunData]) -> Chart | None:
    """Shares of the channels that the final networks keep; None where all keep everything."""
    finished = [run for run in runs if any(kept < size for kept, size in run.widths.values())]
    if not finished:
        return None
    groups = list(dict.fromkeys(group for run in finished for group in run.widths))
    absent = (np.nan, 1)
    kept = {run.name: [np.divide(*run.widths.get(group, absent)) for group in groups] for run in finished}
    rows = groups
    if len(finished) == 1:
        rows = [f"{group}  {kept_}/{size}" for group, (kept_, size) in finished[0].widths.items()]
    return Chart(
        "widths",
        "Widths of the final network" if len(finished) == 1 else "Widths of the final networks",
        "Share of the channels of each group that the exported network keeps.",
        _told({n: f"{np.nanmin(row):.2f} to {np.nanmax(row):.2f} of a group" for n, row in kept.items()}),
        partial(figures.dots, rows, kept, "share kept", _places(runs)),
    )


def _search(run: RunData, runs: Sequence[RunData], number: int, names: list[str]) -> Iterator[Chart]:
    """What the probes of a search by cycles have found, and where the widths went."""
    widths = np.array([run.probes[0]["widths"], *(probe["moved_to"] for probe in run.probes)])
    moved = [f"{name}  {a:.0f} → {b:.0f}" for name, a, b in zip(names, widths[0], widths[-1], strict=True)]
    cycles = np.arange(1.0, 1 + len(widths))
    if np.ptp(widths, 0).any():
        yield Chart(
            f"search_widths_{number}",
            _titled("Widths over the cycles", run, runs),
            "Channels of each group relative to the start. A group that shrinks loses its least important "
            "channels; one that grows gets back those that were trained before, then new ones.",
            ", ".join(moved) + ".",
            partial(figures.heat_map, moved, cycles, (widths / widths[0]).T, "cycle", "width / first width"),
        )
    found = {}
    for cycle, probe in enumerate(run.probes):
        errors = np.array(probe["error"])
        worth = np.where(errors < _UNKNOWN * errors.min(), probe["loss_per_cost"], np.nan)
        found[f"probe {cycle + 1}"] = (worth, errors)
    yield Chart(
        f"search_probes_{number}",
        _titled("What channels are worth", run, runs),
        "Loss per share of the budget that a group's dropped channels save, and its standard error: groups "
        "above the mean grow at the expense of those below. One that has had nothing to drop has no value.",
        _told({p: f"{np.nanmin(worth):.3g} to {np.nanmax(worth):.3g}" for p, (worth, _) in found.items()}),
        partial(figures.estimates, names, found, "loss per share of the budget"),
    )


def _titled(title: str, run: RunData, runs: Sequence[RunData]) -> str:
    return title if len(runs) == 1 else f"{title}: {run.name}"


def _places(runs: Sequence[RunData]) -> dict[str, int]:
    """A run has the same look in every figure."""
    return {run.name: i for i, run in enumerate(runs)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _pairs(shares: np.ndarray, accuracies: np.ndarray) -> str:
    return ", ".join(f"{y:.1f} % at {x:.2g} %" for x, y in zip(shares, accuracies, strict=True))


def _told(facts: dict[str, str]) -> str:
    """What is known of each run, in a sentence."""
    return "; ".join(f"{name}: {fact}" for name, fact in facts.items()) + "."
