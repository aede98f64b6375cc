"""Runs of a bench: so many at a time, none twice, and none that goes on when the bench has ended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offload_sparse.bench import cells, pretrained
from offload_sparse.bench.cells import Run, finish
from offload_sparse.bench.options import OPTIONS, CellsConfig
from offload_sparse.run.errors import RunError
from tests.support import fork_server

pytestmark = pytest.mark.timeout(60)

_WAIT = """
import pathlib, signal, sys, time
mine, others = pathlib.Path(sys.argv[1]), [pathlib.Path(p) for p in sys.argv[2:]]
def saved(*_):
    (mine / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, saved)
(mine / "begun").touch()
while not all((other / "begun").exists() for other in others):
    time.sleep(0.01)
"""
_DONE = """
(mine / "config.yaml").write_text("data: {name: fashion_mnist_small}")
(mine / "summary.json").touch()
"""
_FOREVER = "time.sleep(600)"


@dataclass(frozen=True)
class Scripted(Run):
    """A script in place of a training run: it waits until ``others`` have begun, and does ``then``."""

    others: Sequence[Path] = ()
    then: str = _DONE
    alive: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir()
        process = super().start()
        self.alive[:] = [*(process for process in self.alive if process.poll() is None), process]
        (self.folder / "at_once").write_text(str(len(self.alive)))
        return process

    def command(self) -> list[str]:
        return [sys.executable, "-c", _WAIT + self.then, str(self.folder), *map(str, self.others)]


def test_two_run_at_a_time_and_no_more(tmp_path: Path) -> None:
    """Neither of the first two ends before the other one has begun."""
    folders, alive = [tmp_path / name for name in "abcd"], list[subprocess.Popen[bytes]]()
    pairs = {0: folders[1:2], 1: folders[:1]}
    finish([Scripted(f, {}, 1, pairs.get(i, ()), _DONE, alive) for i, f in enumerate(folders)], jobs=2)
    assert max(int((folder / "at_once").read_text()) for folder in folders) == 2
    assert all((folder / "summary.json").exists() for folder in folders)


def test_a_run_of_two_ranks_counts_twice_or_runs_alone(tmp_path: Path) -> None:
    alive: list[subprocess.Popen[bytes]] = []
    finish([Scripted(tmp_path / name, {}, 2, (), _DONE, alive) for name in "ab"], jobs=3)
    finish([Scripted(tmp_path / name, {}, 2, (), _DONE, alive) for name in "cd"], jobs=1)
    assert {(tmp_path / name / "at_once").read_text() for name in "abcd"} == {"1"}


def test_a_finished_run_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [Scripted(tmp_path / "a", {})] * 2
    finish(runs)  # whose folder could not be made a second time
    finish(runs)
    assert capsys.readouterr().err == "run 1 of 1: a\n"


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("data/cifar100/parquet", "data/cifar10/parquet"),
        ("data/cifar10", None),
        ("fashion_mnist_small", "data/fashion_mnist_small"),
    ],
)
def test_a_finished_run_of_other_images_is_not_reported(held: str, asked: str | None, tmp_path: Path) -> None:
    run = Run(tmp_path / "a", {"data.name": asked} if asked else {})
    run.folder.mkdir()
    (run.folder / "summary.json").touch()
    (run.folder / "config.yaml").write_text(f"data: {{name: {held}}}")
    with pytest.raises(ValueError, match=f"a holds a run on {held}, not on {asked or 'fashion'}.*--cache"):
        finish([run])


@pytest.mark.parametrize("asked", ["data/cifar10", "./data/../data/cifar10", "link", "{}/data/cifar10"])
def test_the_same_images_may_be_named_in_other_ways(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data/cifar10")
    (tmp_path / "config.yaml").write_text("data: {name: data/cifar10}")
    (tmp_path / "summary.json").touch()
    finish([Run(tmp_path, {"data.name": asked.format(tmp_path)})])


def test_when_one_fails_the_others_save_and_end(tmp_path: Path) -> None:
    lives = Scripted(tmp_path / "lives", {}, 1, (), _FOREVER)
    fails = Scripted(tmp_path / "fails", {}, 1, [tmp_path / "lives"], "sys.exit(3)")
    with pytest.raises(RunError, match="fails ended too soon; with --cache the bench resumes it"):
        finish([lives, fails, Scripted(tmp_path / "later", {})], jobs=2)
    assert (tmp_path / "lives" / "saved").exists()
    assert not (tmp_path / "later").exists()


def test_a_signal_to_the_bench_ends_its_runs(tmp_path: Path) -> None:
    lives = Scripted(tmp_path / "lives", {}, 1, (), _FOREVER)
    signals = f"import os; os.kill({os.getpid()}, signal.SIGTERM); {_FOREVER}"
    with pytest.raises(RunError, match="SIGTERM; with --cache the same command goes on"):
        finish([lives, Scripted(tmp_path / "b", {}, 1, [tmp_path / "lives"], signals)], jobs=2)
    assert all((tmp_path / name / "saved").exists() for name in ("lives", "b"))


def bench_that_is_killed(arguments: list[str]) -> None:
    """SIGKILL leaves it no time for anything."""
    kill = f"import os; os.kill(os.getppid(), signal.SIGKILL); {_FOREVER}"
    finish([Scripted(Path(arguments[0]), {}, 1, (), kill)])


def test_a_killed_bench_ends_its_runs(tmp_path: Path) -> None:
    target, lives = f"{__name__}:bench_that_is_killed", tmp_path / "lives"
    with (tmp_path / "log").open("w") as log:
        bench = fork_server.shared().start(target, [str(lives)], os.environ, log.fileno())
        assert bench.wait(60) == -signal.SIGKILL, (tmp_path / "log").read_text()
    while not (lives / "saved").exists():
        time.sleep(0.01)


def test_how_far_a_run_is(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    assert run.epoch() == 0
    for text, epoch in (("", 0), ('{"epoch": 1.5}\n', 1.5), ('{"epoch": 1.5}\n{"epo', 0)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert run.epoch() == epoch


@pytest.mark.parametrize(
    ("given", "said"), [({}, True), ({"cache": "cells"}, False), ({"quick": True}, False)]
)
def test_that_nothing_is_kept_is_said_at_the_start(
    given: dict[str, Any], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with cells.kept(CellsConfig(**given)):
        assert ("--cache" in capsys.readouterr().err) == said


# The folders of the benches

OF_CELLS = [name for name, options in OPTIONS.items() if issubclass(options, CellsConfig)]
LIKE_QUICK: Mapping[str, dict[str, Any]] = {
    "dfbst": {"epochs": 20},
    "pretrained": {"rho": [0.5], "epochs": [1], "dense_epochs": 1},
    "study": {"epochs": 1},
    "sync": {"images": 512},
}
"""Settings of full runs that are as near to those of quick ones as they can be."""
SUMMARY = {
    **dict.fromkeys(("test_accuracy", "params_ratio", "flops_ratio", "train_cost_saving"), 0.5),
    **dict.fromkeys(("steps", "seconds", "step_seconds_median"), 1),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that benches ask for, which are finished at once."""

    def finish_at_once(runs: Iterable[Run], jobs: int = 1) -> None:
        for run in runs:
            found.append(run)
            (run.folder / "model").mkdir(parents=True, exist_ok=True)
            (run.folder / "summary.json").write_text(json.dumps(SUMMARY))
            (run.folder / "metrics.jsonl").write_text('{"train_flops": 1.0}')
            groups = {"groups": {"a": {"kept": [0]}}}
            (run.folder / "model" / "structure.json").write_text(json.dumps(groups))

    found: list[Run] = []
    for name in OF_CELLS:
        monkeypatch.setattr(f"offload_sparse.bench.{name}.finish", finish_at_once)
    monkeypatch.setattr(pretrained, "loading", lambda quick: {})
    return found


@pytest.mark.parametrize("like_quick", [False, True])
@pytest.mark.parametrize("name", OF_CELLS)
def test_a_quick_bench_and_a_full_one_share_only_equal_runs(
    name: str, like_quick: bool, asked: list[Run], tmp_path: Path
) -> None:
    given = LIKE_QUICK[name] if like_quick else {}
    found: list[dict[Path, Mapping[str, Any]]] = []
    for quick in (True, False):
        config = OPTIONS[name](quick=quick, cache=str(tmp_path), **given)
        importlib.import_module(f"offload_sparse.bench.{name}").run(config)
        found.append({run.folder: run.options for run in asked})
        asked.clear()
    assert all(found)
    assert all(found[1].get(folder, options) == options for folder, options in found[0].items())
