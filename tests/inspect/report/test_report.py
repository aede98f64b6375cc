"""The page about runs: what it shows, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from offload_sparse.cli.main import main
from offload_sparse.config import parse as arguments
from offload_sparse.config.run import MethodName
from offload_sparse.export.network_file import FORMAT
from offload_sparse.inspect.report.charts import sections
from offload_sparse.inspect.report.figures import bars, curves, dots, estimates, heat_map
from offload_sparse.inspect.report.memory import ROWS, planned_memory
from offload_sparse.inspect.report.page import write_report
from offload_sparse.inspect.report.page_tables import difference_table, paper_tables, summary_table
from offload_sparse.inspect.report.run_data import read_runs
from offload_sparse.inspect.report.style import STYLES, THEMES, look, scale_of, themed
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.plan.plan import Planner
from offload_sparse.workloads.data.loader import declared_data
from offload_sparse.workloads.models import build_model

SUMMARY = {
    "method": "sparse_offload",
    "model": "offload_sparse/vgg_small",
    "knob": "rho 0.25",
    "test_accuracy": 0.875,
    "params_ratio": 0.0625,
    "flops_ratio": 0.05,
    "train_cost_saving": 12.5,
    "seconds": 40.0,
    "store_bytes": 3 << 20,
    "subnet_bytes_peak": 1 << 20,
    "peak_host_bytes": 1 << 30,
    "peak_device_bytes": 0,
}
LIGHT: dict[str, Any] = {"theme": THEMES["light"], "title": "Title"}
TIMELINE = [["gather", 0.0, 0.1], ["compute", 0.1, 1.0], ["scatter", 1.0, 1.05], ["compute", 1.05, 2.0]]


def write_run(folder: Path, finished: bool = True, everything: bool = True, **config: Any) -> Path:
    """A run of 4 epochs of 10 steps, as training leaves it."""
    folder.mkdir(parents=True)
    flat = [f"--{name}={value}" for name, value in config.items()]
    (folder / "config.yaml").write_text(arguments.dump(arguments.parse(flat)))
    lines: list[dict[str, Any]] = []
    for step in range(5, 41, 5):
        line = {"step": step, "epoch": step / 10, "time": step / 2, "loss": 2 / step, "accuracy": 0.5}
        if everything:
            line |= {"train_flops": 1e9 * step, "entropy": 1 - step / 80, "expected_size": 0.25 + step / 100}
            line |= {"bus_bytes_per_round": 1000.0 * step, "gather_seconds": 0.1, "compute_seconds": 0.9}
        lines.append(line)
        if step % 10 == 0:
            line = {"step": step, "epoch": step / 10, "time": step / 2, "test_accuracy": step / 50}
            if everything:
                line |= {"flops_ratio": step / 800, "host_bytes": step << 24, "round_timeline": TIMELINE}
                line |= {"group_keep": {"conv1": step / 40, "conv2": 0.5}, "deaths": step, "revivals": step}
                line |= dict.fromkeys(
                    ("mask_overlap", "loss_difference_mean", "loss_difference_std"), step / 80
                )
            lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        (folder / "model").mkdir()
        groups = {"conv1": {"size": 8, "kept": [0, 3]}, "conv2": {"size": 4, "kept": [1, 2, 3]}}
        seen = {"shape": [1, 28, 28], "class_names": list("abcdefghij")}
        model = {"format": FORMAT, "model": {}, "preprocessing": seen, "groups": groups, "tensors": {}}
        (folder / "model" / "structure.json").write_text(json.dumps(model))
    return folder


class Page(HTMLParser):
    """The parts of a page that could refer to something else, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.alternatives: list[str] = []
        self.sources: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.references += [values[name] or "" for name in ("src", "srcset", "href") if name in values]
        if tag == "img":
            self.alternatives.append(values.get("alt") or "")
        if tag == "source":
            self.sources.append(values)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report about two runs."""
    folder = tmp_path_factory.mktemp("report")
    paper = {"paper.source": "Some paper, Table 1", "paper.accuracy": 92.5, "paper.flops": 8.7}
    one = write_run(folder / "one", **paper)
    two = write_run(folder / "two <b>", everything=False, **{"round.k": 10})
    assert main(["report", str(one), str(two), "--output", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


def test_the_page_refers_to_nothing_but_itself(report: Path, page: Page) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert page.references
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in page.references)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_every_picture_is_complete_in_both_themes_and_described(page: Page) -> None:
    assert len(page.references) == 2 * len(page.alternatives)
    assert all(source["media"] == "(prefers-color-scheme: dark)" for source in page.sources)
    assert all(len(text) > 20 for text in page.alternatives)
    for reference in page.references:
        root = xml.etree.ElementTree.fromstring(base64.b64decode(reference.partition(",")[2]))
        assert root.tag.endswith("svg")
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_the_same_pictures_lie_beside_the_page_as_png(report: Path, page: Page) -> None:
    names = sorted(path.stem for path in (report / "pictures").glob("*.png"))
    assert len(names) == 2 * len(page.alternatives)
    light, dark = [n for n in names if n.endswith("_light")], [n for n in names if n.endswith("_dark")]
    assert [n.removesuffix("_light") for n in light] == [n.removesuffix("_dark") for n in dark]
    for name in names:
        with Image.open(report / "pictures" / f"{name}.png") as image:
            corner = np.asarray(image.convert("L"))[0, 0]
        assert corner > 240 if name.endswith("_light") else corner < 40


def test_names_of_runs_are_text_and_not_markup(page: Page) -> None:
    assert "b" not in page.tags
    assert "two <b>" in page.text


def test_all_that_runs_record_is_drawn(report: Path) -> None:
    drawn = {path.stem.removesuffix("_dark") for path in (report / "pictures").glob("*_dark.png")}
    assert drawn == {
        *(f"{what}_{axis}" for what in ("loss", "accuracy") for axis in ("step", "train_flops", "time")),
        *("group_keep_0", "widths", "entropy", "expected_size", "deaths", "revivals", "mask_overlap"),
        *("flops_ratio", "loss_difference_mean", "loss_difference_std"),
        *("memory", "host_bytes", "bus_bytes", "timeline_0", "round_seconds"),
    }


def test_what_no_run_has_recorded_is_not_drawn(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", everything=False, finished=False)])
    drawn = {title: [chart.name for chart in charts] for title, charts in sections([run]).items()}
    assert drawn == {"Loss and accuracy": ["loss_step", "loss_time", "accuracy_step", "accuracy_time"]}


@pytest.mark.parametrize(
    ("name", "number", "gone", "left"),
    [("deaths", 0, "deaths", "revivals"), ("conv1", 0.25, "group_keep_0", "widths")],
)
def test_what_says_one_number_throughout_is_not_drawn(
    name: str, number: float, gone: str, left: str, tmp_path: Path
) -> None:
    """A curve, or keep ratios that never move, as those of a run that searches for nothing."""
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(rf'"{name}": [0-9.]+', f'"{name}": {number}', text))
    drawn = [chart.name for charts in sections(read_runs([folder])).values() for chart in charts]
    assert gone not in drawn
    assert left in drawn


def test_rounds_that_move_nothing_have_no_timeline(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"(gather|scatter)", ', '"compute", ', text))
    drawn = [chart.name for charts in sections(read_runs([folder])).values() for chart in charts]
    assert "timeline_0" not in drawn
    assert "round_seconds" in drawn


def test_nor_are_curves_of_which_each_says_a_number_of_its_own(tmp_path: Path) -> None:
    folders = []
    for name, value in (("a", 0.8), ("b", 0.4)):
        folder = write_run(tmp_path / name)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in (line for line in lines if "entropy" in line):
            line["entropy"] = value + 1e-5 * line["step"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    drawn = [chart.name for charts in sections(read_runs(folders)).values() for chart in charts]
    assert "entropy" not in drawn
    assert "expected_size" in drawn


def test_outcomes_alone_are_drawn_once_and_only_beside_others(tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        folder = write_run(tmp_path / name)
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(re.sub(r"(test|validation)_accuracy", "not_evaluated", text))
        folders.append(folder)
    for runs, expected in ((folders[:1], []), (folders, ["accuracy_train_flops"])):
        drawn = [chart.name for charts in sections(read_runs(runs)).values() for chart in charts]
        assert [name for name in drawn if name.startswith("accuracy")] == expected


def test_a_long_title_takes_several_lines() -> None:
    x = np.array([1.0, 2.0])
    name = "Keep ratio per group: a-run-whose-name-is-longer-than-any"
    figure = curves({"a": (x, x)}, "steps", "loss", theme=THEMES["light"], title=name, places={"a": 0})
    title = figure.axes[0].get_title()
    assert len(title.splitlines()) == 2
    assert max(map(len, title.splitlines())) <= 44


def test_dense_memory_is_drawn_once_for_equal_runs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, **{"policy.rho": 0.25, "data.batch_size": size})
        for name, size in (("a", 16), ("b", 16), ("c", 32))
    ]
    for runs, named in ((folders[:2], "dense, planned:"), (folders, "dense for a …: .*; dense for c:")):
        (chart,) = (
            c for charts in sections(read_runs(runs)).values() for c in charts if c.name == "memory"
        )
        assert re.search(named, chart.text)
        assert chart.text.count("dense") == named.count("dense")


def test_the_memory_of_a_run_stands_beside_that_of_the_dense_network(tmp_path: Path) -> None:
    """On the plan's own figures, without the libraries: what the product saves is what is seen."""
    (run,) = read_runs([write_run(tmp_path / "run", **{"policy.rho": 0.25, "data.batch_size": 16})])
    plan = planned_memory(run)
    assert plan is not None
    ours, beside = (dict(zip(ROWS, part, strict=True)) for part in plan)
    parameters = sum(p.numel() for p in build_model("offload_sparse/vgg_small", in_channels=1).parameters())
    statistics = beside["weights, gradients, slots"] - 3 * 4 * parameters
    assert 0 < statistics < 0.02 * 3 * 4 * parameters, "SGD with momentum"
    assert beside["host store"] == 0
    assert ours["host store"] > 2 * 4 * parameters, "weights, momentum, statistics"
    assert ours["weights, gradients, slots"] < beside["weights, gradients, slots"] / 2
    assert ours["activations"] < beside["activations"]
    (dense,) = read_runs([write_run(tmp_path / "dense", method="dense")])
    assert planned_memory(dense) is None


@pytest.mark.parametrize("device", ["cpu", "NVIDIA"])
def test_the_memory_of_a_run_is_that_of_all_its_steps(device: str, tmp_path: Path) -> None:
    """Which have time for a search, and room for what it may find."""
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"steps": 20_000, "device": device}))
    (run,) = read_runs([folder])
    config = arguments.parse(["--train.max_steps", "20000"])
    machine = Machine(1, 1, 1 << 50, None if device == "cpu" else 1 << 50)
    memory = Planner.of(config, declared_data(config.data), machine).memory(machine)
    plan = planned_memory(run)
    assert plan is not None
    assert plan[0] == [memory.store, memory.subnets, memory.activations, memory.device]


# --- series and tables -------------------------------------------------------------------------------


def test_a_quantity_logged_per_epoch_is_placed_on_an_axis_logged_per_line(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    x, y = run.series("test_accuracy", "train_flops")
    assert x.tolist() == [1e10, 2e10, 3e10, 4e10]
    assert y.tolist() == [0.2, 0.4, 0.6, 0.8]


def test_keep_ratios_are_rows_of_groups_over_epochs(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    names, epochs, values = run.group_keep
    assert names == ["conv1", "conv2"]
    assert epochs.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [[0.25, 0.5, 0.75, 1.0], [0.5] * 4]


def test_a_search_by_probes_shows_its_widths_and_what_channels_are_worth(tmp_path: Path) -> None:
    """Widths in the place of the keep ratios, and values with their errors at every probe."""
    run = write_run(tmp_path / "run")
    worth = {"loss_per_cost": [2.0, -1.0], "error": [0.5, 0.25], "advantage": [1.0, -1.0]}
    probes = [
        {"widths": [8.0, 4.0], "moved_to": [9.0, 3.0]} | worth,
        {"widths": [9.0, 3.0], "moved_to": [11.0, 2.0]} | worth,
    ]
    line = {"step": 40, "epoch": 4, "group_keep": {"conv1": 0.5, "conv2": 0.5}, "probes": probes}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    [data] = read_runs([run])
    charts = {chart.name: chart for chart in sections([data])["Structure"]}
    assert "group_keep_0" not in charts
    assert charts["search_widths_0"].text == "conv1  8 → 11, conv2  4 → 2."
    axes = charts["search_probes_0"].draw(THEMES["light"]).axes[0]
    assert [list(bar.lines[0].get_xdata()) for bar in axes.containers] == [[2.0, -1.0]] * 2
    spread = [segment[:, 0].tolist() for segment in axes.containers[0].lines[2][0].get_segments()]
    assert spread == [[1.5, 2.5], [-1.25, -0.75]]
    shown = charts["search_widths_0"].draw(THEMES["light"]).axes[0].collections[0].get_array()
    np.testing.assert_allclose(shown.reshape(2, 3), [[1, 9 / 8, 11 / 8], [1, 3 / 4, 1 / 2]])


def test_widths_that_never_moved_and_unknown_errors_are_not_drawn(tmp_path: Path) -> None:
    """A group of one channel, of which none can be dropped, would squeeze all others into a line."""
    run = write_run(tmp_path / "run")
    worth = {"loss_per_cost": [2.0, 0.0], "error": [0.5, 1e6], "advantage": [0.0, 0.0]}
    probes = [{"widths": [8.0, 1.0], "moved_to": [8.0, 1.0]} | worth]
    line = {"step": 40, "epoch": 4, "group_keep": {"conv1": 0.5, "conv2": 0.25}, "probes": probes}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    charts = {chart.name: chart for chart in sections(read_runs([run]))["Structure"]}
    assert "search_widths_0" not in charts
    assert charts["search_probes_0"].text == "probe 1: 2 to 2."
    axes = charts["search_probes_0"].draw(THEMES["light"]).axes[0]
    assert axes.get_xlim()[1] < 3


def test_the_members_of_a_family_are_a_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    members = {"0.02": {"flops_ratio": 0.02, "params_ratio": 0.03, "test_accuracy": 0.75}}
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"members": members}))
    charts = {chart.name: chart for chart in sections(read_runs([run]))["Structure"]}
    assert charts["members"].text == "run: 75.0 % at 2 %, 87.5 % at 5 %."
    [line] = charts["members"].draw(THEMES["light"]).axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[2, 75], [5, 87.5]])


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45, "lo')
    (run,) = read_runs([folder])
    assert run.lines[-1]["step"] == 40


def test_the_papers_row_stands_beside_the_runs_that_aim_at_it(tmp_path: Path) -> None:
    aims = write_run(
        tmp_path / "a", **{"paper.source": "P, Table 1", "paper.accuracy": 92.5, "paper.flops": 8.7}
    )
    runs = read_runs([aims, write_run(tmp_path / "b")])
    (table,) = paper_tables(runs)
    assert table.title == "Against P, Table 1"
    assert table.header == ("", "paper", "a")
    assert table.rows == (("accuracy", "92.50 %", "87.50 %"), ("FLOPs kept", "8.70 %", "5.00 %"))


def test_every_row_of_a_published_table_has_a_table_of_its_own(tmp_path: Path) -> None:
    aims = {"a": 95.6, "b": 90.93, "c": 95.6}
    runs = read_runs(
        write_run(tmp_path / name, **{"paper.source": "P, Table 2", "paper.accuracy": accuracy})
        for name, accuracy in aims.items()
    )
    tables = paper_tables(runs)
    assert [table.header[2:] for table in tables] == [("a", "c"), ("b",)]
    assert [table.rows[0][1] for table in tables] == ["95.60 %", "90.93 %"]


def test_the_table_of_differences_names_what_differs(tmp_path: Path) -> None:
    """The settings that differ between the runs, and no others."""
    folders = [
        write_run(tmp_path / name, **{"round.k": k, "run_dir": name}) for name, k in (("a", 50), ("b", 10))
    ]
    runs = read_runs(folders)
    table = difference_table(runs)
    assert table is not None
    assert table.rows == (("round.k", "50", "10"),)
    assert difference_table(runs[:1]) is None


def test_a_run_that_is_not_finished_says_where_it_stands(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", finished=False)])
    assert summary_table(runs).rows[0] == ("state", "finished", "at step 40")


def test_equal_rows_are_said_once_and_the_best_is_marked(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    better = SUMMARY | {"test_accuracy": 0.9, "store_bytes": 5 << 30, "seconds": 30.0}
    (folders[1] / "summary.json").write_text(json.dumps(better))
    table = summary_table(read_runs(folders))
    assert table.rows == (
        ("test accuracy", "87.50%", "90.00%"),
        ("time (seconds)", "40", "30"),
        ("store per rank (GiB)", "0.00293", "5"),
    )
    assert table.best == {(0, 2), (1, 2)}
    started = "method sparse_offload, model offload_sparse/vgg_small, set by rho 0.25"
    assert table.shared.startswith(started)


def test_a_single_run_has_all_its_rows_and_no_best(tmp_path: Path) -> None:
    table = summary_table(read_runs([write_run(tmp_path / "a")]))
    assert ("method", "sparse_offload") in table.rows
    assert (table.best, table.shared) == (frozenset(), "")


def test_a_report_of_all_folders_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``report runs/*`` meets the folder that it wrote itself; of pictures one will do."""
    monkeypatch.setattr(
        "offload_sparse.inspect.report.page.sections",
        lambda runs: {"One": next(iter(sections(runs).values()))[:1]},
    )
    for name in "ab":
        write_run(tmp_path / name, everything=False)
    for _ in range(2):
        assert main(["report", *map(str, sorted(tmp_path.glob("*")))]) == 0
    assert sorted(path.name for path in tmp_path.glob("*")) == ["a", "b", "report"]


def test_a_report_replaces_its_own_pictures_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sparse.inspect.report.page.sections", lambda runs: {})
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "holiday.png").write_bytes(b"mine")
    (pictures / "sea_light.png").write_bytes(b"mine")
    runs = read_runs([write_run(tmp_path / "run", everything=False)])
    write_report(runs, tmp_path)
    assert sorted(file.name for file in pictures.iterdir()) == ["holiday.png", "sea_light.png"]
    (pictures / "deaths_dark.png").touch()  # of which an earlier report had something to show
    write_report(runs, tmp_path)
    assert "deaths_dark.png" not in {file.name for file in pictures.iterdir()}
    assert (pictures / "holiday.png").read_bytes() == b"mine"


def test_the_first_column_of_a_table_stays_on_a_telephone(report: Path) -> None:
    style = (report / "report.html").read_text(encoding="utf-8")
    assert re.search(r"th:first-child\{[^}]*position:sticky;left:0", style)


def test_a_final_point_has_the_mark_of_its_run() -> None:
    ends = {"a": (3.0, 0.9), "b": (3.0, 0.8)}
    series = {name: (np.arange(3.0), np.arange(3.0)) for name in ends}
    with themed(THEMES["light"]):
        figure = curves(series, "steps", "accuracy", ends=ends, places={"a": 0, "b": 1}, **LIGHT)
    marks = [line.get_marker() for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert marks == [look(THEMES["light"], i)["marker"] for i in range(2)]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == ["x/run", "y/run"]


# --- figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_the_colours_of_runs_stand_out_from_the_panel_and_from_each_other(theme: Any) -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(colour, theme.panel) >= 3 for colour in theme.colours), "graphics, WCAG 1.4.11"
    assert contrast(theme.text, theme.panel) >= 7
    assert contrast(theme.muted, theme.panel) >= 4.5
    looks = [look(theme, i) for i in range(STYLES)]
    for key in ("color", "linestyle", "marker"):
        assert len({str(entry[key]) for entry in looks}) == STYLES, key


VISION = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
    "everybody": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}
"""Of linear RGB: Machado, Oliveira & Fernandes (2009), severity 1."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colours: tuple[str, ...], vision: str) -> np.ndarray:
    """CIE L*a*b* [n, 3] of colours as they are seen, for the white point D65."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISION[vision]).T, 0, 1) @ XYZ.T / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_the_colours_of_runs_are_apart_for_every_kind_of_vision(theme: Any, vision: str) -> None:
    """A difference of 2.3 is just noticeable; large ones are needed for thin lines."""
    found = lab(theme.colours, vision)
    apart = np.linalg.norm(found[:, None] - found[None], axis=2)[np.triu_indices(STYLES, 1)]
    assert apart.min() > 20


def test_there_are_as_many_styles_as_methods() -> None:
    assert len(get_args(MethodName)) <= STYLES


@pytest.mark.parametrize("rows", [1, 6, 60, 200])
def test_the_names_of_many_rows_do_not_overlap(rows: int) -> None:
    names = [f"layer{i}.some.long.name.of.a.module.conv{i}" for i in range(rows)]
    with themed(THEMES["light"]):
        figure = heat_map(names, np.arange(1.0, 5), np.full((rows, 4), 0.5), "epoch", "kept", **LIGHT)
        figure.savefig(io.BytesIO(), dpi=80)
        labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))


ANY_NAMES = ("_a", "_b", r"x$\fooo$1")
PLACES = {name: i for i, name in enumerate(ANY_NAMES)}
ROW_OF = np.array([0.25, 0.5, 0.75])
WITH_A_LEGEND: dict[str, Callable[..., Figure]] = {
    "curves": partial(curves, dict.fromkeys(ANY_NAMES, (ROW_OF, ROW_OF)), "steps", "loss", places=PLACES),
    "dots": partial(dots, ANY_NAMES, dict.fromkeys(ANY_NAMES, ROW_OF.tolist()), "share kept", PLACES),
    "estimates": partial(estimates, ANY_NAMES, dict.fromkeys(ANY_NAMES, (ROW_OF, ROW_OF)), "loss"),
    "bars": partial(bars, ANY_NAMES, dict.fromkeys(ANY_NAMES, ROW_OF.tolist()), "bytes", PLACES),
}


@pytest.mark.parametrize("kind", WITH_A_LEGEND)
def test_whatever_runs_are_called_their_names_are_in_the_legend(kind: str) -> None:
    with themed(THEMES["light"]):
        figure = WITH_A_LEGEND[kind](theme=THEMES["light"], title=f"Title: {ANY_NAMES[-1]}")
        figure.savefig(io.BytesIO(), dpi=80)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(ANY_NAMES)


def test_a_long_curve_is_drawn_with_few_points() -> None:
    x = np.arange(100_000.0)
    with themed(THEMES["light"]):
        figure = curves({"run": (x, x)}, "steps", "loss", places={"run": 0}, **LIGHT)
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) <= 300
    assert np.mean(line.get_ydata()) == pytest.approx(x.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("largest", "unit", "expected"),
    [
        (1536, "bytes", (1024.0, "KiB")),
        (3 << 40, "bytes", (1024.0**4, "TiB")),
        (5e10, "FLOP", (1e9, "GFLOP")),
        (0.002, "seconds", (1e-3, "ms")),
        (7200, "seconds", (60.0, "minutes")),
        (0, "bytes", (1.0, "B")),
    ],
)
def test_units_fit_the_size(largest: float, unit: str, expected: tuple[float, str]) -> None:
    assert scale_of(largest, unit) == expected


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["report"], ["report", "no/such/run"]])
def test_without_a_run_there_is_one_line_of_advice(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give a run's folder" in error or "RUNS is missing" in error


def test_damaged_or_doubled_runs_are_one_line_of_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), str(run)]) == 2
    assert "is given twice" in capsys.readouterr().err
    (run / "summary.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "summary.json is damaged" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run)]) == 2
    assert "holds no lines yet" in capsys.readouterr().err


# --- a real browser ----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_in_the_theme_that_its_user_prefers(
    width: int, report: Path, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    shades = []
    for scheme in (0, 1):  # dark, light
        file = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1800"),
                *(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={file}"),
                (report / "report.html").as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        with Image.open(file) as image:
            assert image.width == width
            pixels = np.asarray(image.convert("L"))
        shades.append(float(np.median(pixels)))
        assert pixels.std() > 10, "something is drawn"
    dark, light = shades
    assert dark < 40
    assert light > 230


def test_the_example_in_the_help_is_a_report_of_several_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert re.search(r"usage: offload-sparse report \[RUNS \.\.\.\]", capsys.readouterr().out)


def test_a_report_is_written_into_the_only_run_or_beside_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from offload_sparse.inspect.report import page as page_module

    monkeypatch.setattr(page_module, "write_report", lambda runs, folder: folder)
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["report", runs[0]]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "report")
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report")
