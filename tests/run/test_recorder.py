"""What a run leaves in its folder and shows while it runs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.export.json_values import json_value
from offload_sparse.run import terminal as terminal_module
from offload_sparse.run.log import Recorder
from offload_sparse.run.terminal import closing_table

SUMMARY: dict[str, Any] = {"method": "dense", "knob": "rho 0.25", "test_accuracy": 0.9}
SUMMARY |= {"peak_host_bytes": 3 << 20}


def run_config(run_dir: Path, **values: Any) -> RunConfig:
    return RunConfig(run_dir=run_dir, **values)


def complete_run(config: RunConfig) -> None:
    config.run_dir.mkdir(exist_ok=True)
    with Recorder(config) as recorder:
        recorder.begin(4, 2)
        recorder.log(1, loss=1.0)
        recorder.finish(SUMMARY)
    (config.run_dir / "model").mkdir()
    (config.run_dir / "model" / "weights").write_text("w")


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_configuration_metrics_and_summary(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run")
    complete_run(config)
    assert arguments.parse(["--config", str(config.run_dir / "config.yaml")]) == config
    assert json.loads((config.run_dir / "summary.json").read_text()) == SUMMARY
    assert sorted(entry.name for entry in config.run_dir.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model",
        "summary.json",
    ]


def test_a_line_of_metrics_is_there_at_once(tmp_path: Path) -> None:
    """Each has a step, an epoch and a time."""
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(total_steps=8, steps_per_epoch=4)
        recorder.log(2, loss=0.5, note="x")
        first = lines(tmp_path)
        recorder.log(6, loss=torch.tensor(0.25))
        second = lines(tmp_path)
    assert [(line["step"], line["epoch"], line["loss"]) for line in second] == [(2, 0.5, 0.5), (6, 1.5, 0.25)]
    assert first == second[:1]
    assert 0 <= second[0]["time"] <= second[1]["time"]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(1, 1)
        recorder.log(1, loss=float("nan"), worst=torch.tensor(float("inf")))
        recorder.finish({"ratio": float("-inf"), "nested": {"values": [1.0, float("nan")]}})
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["worst"]) == (None, None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"ratio": None, "nested": {"values": [1.0, None]}}


def test_plain_values_are_unchanged_by_json_value() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": Path("d")}}
    assert json_value(value) == {"a": [1, 2.5, None, True, "x"], "b": {"c": "d"}}


def test_trackers_receive_the_finite_numbers(tmp_path: Path) -> None:
    received: list[tuple[dict[str, float], int]] = []

    def track(values: dict[str, float], step: int) -> None:
        received.append((values, step))

    with Recorder(run_config(tmp_path), track=track) as recorder:
        recorder.begin(4, 2)
        recorder.log(3, loss=0.5, bad=float("nan"), note="x", flag=True, group_keep={"conv1": 0.25})
    ((values, step),) = received
    assert step == 3
    assert values.pop("time") >= 0
    assert values == {"epoch": 1.5, "loss": 0.5, "group_keep/conv1": 0.25}


def test_only_the_main_process_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    received: list[Any] = []
    run_dir = tmp_path / "run"
    with Recorder(run_config(run_dir), is_main=False, track=lambda *_: received.append(_)) as recorder:
        recorder.begin(2, 1)
        recorder.advance()
        recorder.log(1, loss=1.0)
        recorder.advance()
        recorder.finish(SUMMARY)
    assert not run_dir.exists()
    assert not received
    assert capsys.readouterr() == ("", "")


# --- the run folder ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    complete_run(run_config(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"holds a run already; .*--run_dir.*--overwrite true"):
        Recorder(run_config(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_started_run_counts_too(tmp_path: Path) -> None:
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(2, 1)
    with pytest.raises(ValueError, match="holds a run already"):
        Recorder(run_config(tmp_path))


def test_overwrite_removes_the_files_of_the_run_and_nothing_else(tmp_path: Path) -> None:
    complete_run(run_config(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with Recorder(run_config(tmp_path, overwrite=True)) as recorder:
        assert (tmp_path / "summary.json").exists(), "a run that has not begun costs no earlier run"
        recorder.begin(2, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl", "notes.txt"]
    assert lines(tmp_path) == []


def test_overwrite_follows_no_link_out_of_the_folder(tmp_path: Path) -> None:
    complete_run(run_config(tmp_path / "other"))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Recorder(run_config(run_dir)) as recorder:
        recorder.begin(2, 1)
    (run_dir / "model").symlink_to(tmp_path / "other" / "model")
    with Recorder(run_config(run_dir, overwrite=True)) as recorder:
        recorder.begin(2, 1)
    assert not os.path.lexists(run_dir / "model")
    assert (tmp_path / "other" / "model" / "weights").exists()


def test_overwrite_never_removes_a_model_folder_that_no_run_left(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="holds model, which no complete run left there"):
        Recorder(run_config(tmp_path, overwrite=True))
    assert (tmp_path / "model").is_dir()


def test_a_run_that_fails_before_its_first_step_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model"), Recorder(run_config(tmp_path)):
        raise ValueError("no model")
    assert list(tmp_path.iterdir()) == []


def test_a_summary_that_cannot_be_written_as_json_leaves_none_behind(tmp_path: Path) -> None:
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(1, 1)
        with pytest.raises(ValueError, match="object"):
            recorder.finish({"bad": object()})
    assert not (tmp_path / "summary.json").exists()


# --- what is shown -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train_two_epochs(config: RunConfig) -> None:
    with Recorder(config) as recorder:
        recorder.begin(total_steps=5, steps_per_epoch=2)
        for step in range(5):
            recorder.advance()
            recorder.log(step + 1, loss=1 / (step + 1), accuracy=0.5, expected_size=0.25, entropy=0.6, lr=0.1)
            if step == 1:
                recorder.log(step + 1, test_accuracy=0.875)
        recorder.finish(SUMMARY)


def test_without_a_terminal_there_is_one_line_per_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_two_epochs(run_config(tmp_path))
    assert without_times(capsys.readouterr().err) == EPOCHS


EPOCHS = [
    "epoch 1/3 step 2 loss 0.5 accuracy 50.0% test 87.5%",
    "epoch 2/3 step 4 loss 0.25 accuracy 50.0%",
    "epoch 3/3 step 5 loss 0.2 accuracy 50.0% test 90.0%",
]


def without_times(text: str) -> list[str]:
    """The lines about epochs, which end with the time spent and the time left."""
    found = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("epoch ")]
    parts = [re.fullmatch(r"(.*) elapsed \d\d:\d\d left \d\d:\d\d", line) for line in found]
    return [match[1] for match in parts if match]


def test_the_time_left_follows_from_the_steps_of_this_part_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its first step on."""
    now = 0.0
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now)
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(total_steps=100, steps_per_epoch=1, step=20, seconds=1000)
        for _ in range(11):
            now += 3
            recorder.advance()
    said = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"{3 * left // 60:02}:{3 * left % 60:02}" for left in range(79, 69, -1)]


def test_the_time_left_counts_the_steps_that_a_rollback_takes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They took as long as any other."""
    now = 0.0
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now)
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(total_steps=100, steps_per_epoch=50)
        for step in range(91):  # to step 45, and from step 5 to step 51
            now += 1
            recorder.advance()
            if step == 44:
                recorder.go_back(5)
    said = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["00:50"], "of a hundred steps"


def test_a_terminal_gets_a_bar_with_the_figures_below_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    train_two_epochs(run_config(tmp_path))
    drawn = terminal.getvalue().replace("\n", "\r").split("\r")
    assert any("4/5, loss 0.3333, accuracy 50.0%, 00:00 left" in line for line in drawn)
    assert max(map(len, drawn)) <= 80, "of a bar"
    assert without_times(terminal.getvalue()) == EPOCHS


def test_what_else_is_said_stands_on_lines_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings of ours and of libraries, and lines to tell, while the bar is drawn."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(total_steps=4, steps_per_epoch=4)
        recorder.advance()
        logging.getLogger("offload_sparse.run.somewhere").warning("one of ours")
        recorder.advance()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("one of a library", stacklevel=1)
        recorder.advance()
        terminal_module.tell("a line to tell")
        recorder.advance()
        recorder.finish(SUMMARY)
    shown = [on_screen(line) for line in terminal.getvalue().split("\n")]
    assert "one of ours" in shown
    assert any("UserWarning: one of a library" in line and "/4" not in line for line in shown)
    assert "a line to tell" in shown
    assert [line[:9] for line in shown if line.startswith("epoch")] == ["epoch 1/1"]


def on_screen(line: str) -> str:
    """What is left to see of a line that was written over after each carriage return."""
    seen = ""
    for part in line.split("\r"):
        seen = part + seen[len(part) :]
    return seen.rstrip()


def test_progress_can_be_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    config.quiet = True
    train_two_epochs(config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(300, "epoch 200/240 step 1000000 loss"), (90, "epoch 200/240 loss"), (60, "epoch 200/240 loss")],
)
def test_lines_of_a_long_run_fit_their_columns(
    columns: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, now = Terminal(), 0.0
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now)
    monkeypatch.setenv("COLUMNS", str(columns))
    with Recorder(run_config(tmp_path)) as recorder:
        recorder.begin(1_200_000, 5_000, step=999_998, seconds=300_000)
        for step in range(3):
            now += 0.3
            accuracies = {"validation_accuracy": 0.66666, "test_accuracy": 0.5} if step == 1 else {}
            recorder.log(999_999 + step, loss=0.0001234567, accuracy=1.0, **accuracies)
            recorder.advance()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line[: len(shown)] for line in epochs] == [shown]
    assert "accuracy 100.0% validation 66.7% test" in epochs[0] or columns < 80
    assert max(map(len, epochs)) <= min(columns, 100)
    assert max(len(line) for line in lines if line not in epochs) <= min(columns, 80)


@pytest.mark.parametrize(
    ("method", "setting"),
    [("rigl", "raise policy.rho"), ("dst", "lower dst.alpha"), ("a_users_own", "raise policy.rho")],
)
def test_a_network_that_collapses_is_a_warning(
    method: str, setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    terminal_module.warn_of_collapse(method, 0.0003, one_class=False)
    assert f"only 0.03% of the weights are left; {setting}" in caplog.text
    terminal_module.warn_of_collapse(method, 0.5, one_class=True)
    assert "every image for the same class" in caplog.text


def test_a_table_closes_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_two_epochs(run_config(tmp_path))
    output = capsys.readouterr().out
    for shown in ("dense", "rho 0.25", "90.00%", "3.0 MiB", "run folder:"):
        assert shown in output


def test_the_table_leaves_out_what_the_summary_lacks() -> None:
    assert closing_table({"method": "dense", "seconds": None}).row_count == 1
    assert closing_table({"test_accuracy": 0.0, "peak_device_bytes": 0}).row_count == 1, "no device"
