"""Whatever a command prints fits a hundred columns, of whatever width the terminal is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from offload_sparse.bench.contract import BenchResult, print_result
from offload_sparse.cli import main as cli
from offload_sparse.cli.table import show
from offload_sparse.config.run import MethodName, RunConfig, resolve
from offload_sparse.inspect import coverage, doctor
from offload_sparse.inspect.doctor import Finding
from offload_sparse.run.plan.dry_run import dry_run, dry_run_table
from offload_sparse.run.terminal import console, fitted

MODEL = ("--model.name", "offload_sparse/vgg_small", "--model.arguments.width", "0.1")
DATA = ("--data.limit", "64", "--data.batch_size", "32")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints, all of whose lines fit."""
    capsys.readouterr()
    if "--help" in argv:
        with pytest.raises(SystemExit):
            cli.main(list(argv))
    else:
        assert cli.main(list(argv)) == code
    out, err = capsys.readouterr()
    text = err + out
    assert text
    assert [line for line in text.splitlines() if len(line) > 100] == []
    return text


MASKED = ("dfbst", "rigl", "grow_efficient")  # in tests/run/test_methods_run, too


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in MASKED else ()) for m in get_args(MethodName)],
)
def test_a_run_by_any_method(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its start with its own knob, its epochs, its end; evaluated, exported; started once more."""
    monkeypatch.chdir(tmp_path)
    argv = ("train", "--method", method, *MODEL, *DATA, "--train.epochs", "2", "--run_dir", "r")
    text = printed(capsys, *argv)
    assert [line.split(":")[0] for line in text.splitlines()[:3]] == ["device", "model", "data"]
    knobs = {"dst": "alpha", "dfbst": "alpha", "dense": "all weights"}
    started = next(line for line in text.splitlines() if line.startswith("train: "))
    assert knobs.get(method, "rho") in started
    assert ("rho" in started) == (method not in knobs)
    assert "finished" in printed(capsys, *argv)
    assert "accuracy" in printed(capsys, "evaluate", "r")
    assert "largest difference" in printed(capsys, "export", "r", "--format", "safetensors")


def test_a_run_fits_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    argv = ("train", "--method", "static", *MODEL, *DATA, "--train.max_steps", "2", "--run_dir", "r")
    for text in (printed(capsys, *argv), printed(capsys, *argv)):
        assert max(map(len, text.splitlines())) <= 80


def test_a_quiet_run_shows_its_outcome_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("train", "--quiet", "--method", "static", *MODEL, *DATA, "--train.max_steps", "2")
    printed(capsys, *argv, "--run_dir", str(tmp_path / "r"))
    assert cli.main([*argv, "--run_dir", str(tmp_path / "r")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "finished" in out


def test_what_is_said_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "plan", *MODEL)
    printed(capsys, "train", *MODEL, "--dry_run")
    printed(capsys, "verify", "--model", "offload_sparse/vgg_small", code=0)
    for command in ((), *([name, "--help"] for name in cli.COMMANDS)):
        printed(capsys, *command)


def test_a_machine_with_much_to_find(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a word and another " * 12
    findings = [Finding("limits", state, words, words) for state in ("warning", "error")]
    findings.append(Finding("limits", "ok", words))
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    assert printed(capsys, "doctor", code=1).count("fix: ") == 2


def test_the_table_of_all_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = max(coverage.CASES, key=lambda case: len(case.name))
    reason = "a layer meets another one of which nobody has ever heard; " * 3

    def examine(case: object, **_: object) -> list[coverage.Row]:
        seconds = {"discover_seconds": 1234.5, "seconds": 2000.0}
        return [
            {"model": longest.name, "image_size": 64, "accepted": False, "residual": "internal"}
            | {"atoms": 123_456, "groups": 100, "modes_differ": True, "reason": reason} | seconds
            | dict.fromkeys(("output_error", "gradient_error", "export_difference"))
        ]

    monkeypatch.setattr(coverage, "examine", examine)
    assert "refused: a layer" in printed(capsys, "verify", "--all", code=1)


def test_the_figures_of_a_bench(capsys: pytest.CaptureFixture[str]) -> None:
    row = ["a setting with a long name of many words"] * 2 + [0.123456] * 9
    print_result(BenchResult({"ratio": 0.5}, {}, [f"column {i}" for i in range(11)], [row]), "a bench")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    printed(capsys, "bench")


def test_names_in_a_table_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets of a sweep's folders, and colons."""
    name = "runs/[/x]/sweep[rho=0.1]:smile:"
    show({"path": name}, json_wanted=False)
    figures = dry_run(resolve(RunConfig(paper={"source": name}), "cpu"))
    console().print(dry_run_table(figures))
    assert capsys.readouterr().out.count(name) == 2


def test_a_line_is_broken_between_words_only() -> None:
    path = "/folder" * 20
    lines = fitted(f"  run folder: {path} holds " + "a run " * 20).splitlines()
    assert lines[0] == "  run folder:"
    assert lines[1] == f"    {path}"
    assert all(line.startswith("    ") and len(line) <= 100 for line in lines[2:])
