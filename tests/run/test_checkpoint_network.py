"""``evaluate`` and ``export`` take a checkpoint of a run as they take the run."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.run.position import Progress
from tests.support.image_runs import contents

OPTIONS = {
    "model.name": "offload_sparse/vgg_small",
    "model.arguments.width": "0.25",
    "data.limit": "128",
    "data.batch_size": "32",
    "train.epochs": "2",
    "checkpoint.every": "2",
    "checkpoint.keep": "9",
    "trackers": "[]",
    "quiet": "true",
}


def train(folder: Path, **more: str) -> Path:
    words = [word for name, value in (OPTIONS | more).items() for word in (f"--{name}", value)]
    assert main(["train", *words, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json", "true"]) == 0
    return json.loads(capsys.readouterr().out)


def checkpoints(run: Path) -> list[Path]:
    found = [path for path in (run / "checkpoints").iterdir() if path.name.startswith("step_")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def test_the_last_checkpoint_is_the_network_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    *_, last = checkpoints(run)
    told(capsys, "export", str(last), "--output", str(tmp_path / "last"))
    ours, other = (load_pruned(folder).state_dict() for folder in (run / "model", tmp_path / "last"))
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before, "the run is as it was"


def test_an_earlier_checkpoint_is_evaluated_and_exported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoints(run)[0]
    figures = told(capsys, "evaluate", str(first))
    final = told(capsys, "evaluate", str(run))
    assert figures["images"] == final["images"] == 128
    assert figures["loss"] != final["loss"]
    told(capsys, "export", str(first))
    again = told(capsys, "evaluate", str(run / "export" / f"{first.name}_safetensors"))
    assert again["loss"] == figures["loss"]


def test_checkpoints_may_lie_on_another_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a link to them in the run's folder, and one to a checkpoint elsewhere."""
    linked = Path(shutil.copytree(run, tmp_path / "run"))
    (linked / "checkpoints").rename(tmp_path / "disk")
    (linked / "checkpoints").symlink_to(tmp_path / "disk")
    first = checkpoints(run)[0]
    (tmp_path / "first").symlink_to(first)
    there = told(capsys, "evaluate", str(linked / "checkpoints" / first.name))
    assert there["loss"] == told(capsys, "evaluate", str(tmp_path / "first"))["loss"]
    assert there["images"] == 128, "of the run's images"


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_7"])
def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(
    command: str, name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(run / name)]) == 2
    error = capsys.readouterr().err
    assert all(path.name in error for path in checkpoints(run))
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoints(run)[1]
    (first / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert main(["evaluate", str(first)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_store_in_files_is_only_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped within a round gives what one in memory gives, and goes on as it was."""
    short = {"round.k": "3", "checkpoint.every": "1"}
    in_memory = train(tmp_path / "ram", **short)
    advance = Progress.advance

    def stop_at_five(progress: Progress) -> None:
        advance(progress)
        if progress.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop_at_five)
        on_disk = train(tmp_path / "file", **short, **{"store.tier": "file"})
    assert checkpoints(on_disk)[-1].name == "step_00000005"
    before = contents(on_disk)
    for folder in (in_memory, on_disk):
        checkpoint, output = folder / "checkpoints" / "step_00000005", tmp_path / "exported" / folder.name
        told(capsys, "export", str(checkpoint), "--output", str(output))
    assert contents(on_disk) == before
    ours, other = (load_pruned(tmp_path / "exported" / name).state_dict() for name in ("ram", "file"))
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    capsys.readouterr()
    assert main(["evaluate", str(on_disk / "checkpoints" / "step_00000004")]) == 2
    assert re.search(
        r"step_00000004 is of step 4, .* gone on to step 5; take the newest", capsys.readouterr().err
    )
