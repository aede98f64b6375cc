"""A disk that fills is one line and exit code 1, wherever it does; with space again the same command resumes
and ends with the bits of the run that had it. A run is finished only as long as what it came to is whole.

What is to be written leads to ``/dev/full``, on which every write says that there is no space left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from offload_sparse.cli.main import main
from offload_sparse.export import convert
from offload_sparse.run import trainer
from tests.run import killed_run

Fill = Callable[[pytest.MonkeyPatch, Path], None]


def before(step: int, place: str) -> Fill:
    """Before a step, or at the end for -1, have a file of the run lead to the full disk."""

    def fill(patch: pytest.MonkeyPatch, run_dir: Path) -> None:
        name = "finalize" if step < 0 else "train_step"
        original = getattr(trainer.Run, name)

        def filled(run: trainer.Run, *arguments: Any) -> Any:
            if step < 0 or arguments[0] == step:
                lead_to_full(run_dir, place)
            return original(run, *arguments)

        patch.setattr(trainer.Run, name, filled)

    return fill


def lead_to_full(run_dir: Path, place: str) -> None:
    found = list(run_dir.glob(place)) or [run_dir / place]
    found[0].parent.mkdir(exist_ok=True)
    found[0].unlink(missing_ok=True)
    found[0].symlink_to("/dev/full")


def at_the_log(patch: pytest.MonkeyPatch, run_dir: Path) -> None:
    original = trainer.Run.train_step

    def train_step(run: trainer.Run, step: int, batch: Any) -> None:
        original(run, step, batch)
        if step == 2:
            run.recorder._metrics = (run_dir.parent / "full").open("a")

    (run_dir.parent / "full").symlink_to("/dev/full")
    patch.setattr(trainer.Run, "train_step", train_step)


FULL: dict[str, Fill] = {
    "its configuration": lambda patch, run_dir: lead_to_full(run_dir, "config.yaml.tmp"),
    "its log": at_the_log,
    "its tracker": before(5, "trackers/*/events.*"),
    "its write-ahead log": before(5, "store/rank0/log/round-6.safetensors.tmp"),
    "the weights of its network": before(-1, "model/weights.safetensors.tmp"),
    "the structure of its network": before(-1, "model/structure.json.tmp"),
    "its summary": before(-1, "summary.json.tmp"),
}


def run(run_dir: Path, *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["train", *killed_run.OPTIONS, "--store.tier", "file", "--run_dir", str(run_dir), *more])


def weights(run_dir: Path) -> str:
    return hashlib.blake2b((run_dir / "model" / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert run(run_dir) == 0
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> str:
    return weights(finished)


# One of the files of the network and one of the damages of a kind are tried by default.
LONG = {"the structure of its network", "an empty structure", "a summary of another kind"}


def few(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(c, id=n, marks=pytest.mark.slow if n in LONG else ()) for n, c in cases.items()]


@pytest.mark.parametrize("fill", few(FULL))
def test_a_disk_that_fills_is_one_line_and_the_run_resumes(
    fill: Fill,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        (tmp_path / "run").mkdir()
        fill(patch, tmp_path / "run")
        assert run(tmp_path / "run") == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [text for text in said.splitlines() if "error:" in text]
    assert "cannot be written (No space left on device); free space, and the same command resumes" in line
    assert run(tmp_path / "run") == 0
    assert weights(tmp_path / "run") == undisturbed


def test_an_export_to_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written beside the files of an earlier one."""
    assert run(tmp_path / "run") == 0
    output = tmp_path / "export"
    output.mkdir()
    lead_to_full(output / "part", "weights.safetensors.tmp")
    monkeypatch.setattr(convert.tempfile, "TemporaryDirectory", lambda *_: nullcontext(output / "part"))
    assert main(["export", str(tmp_path / "run"), "--output", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "error:" in line
    assert "No space left on device" in line
    assert not (output / "weights.safetensors").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no network": lambda run_dir: shutil.rmtree(run_dir / "model"),
    "an empty structure": lambda run_dir: os.truncate(run_dir / "model" / "structure.json", 0),
    "other weights": lambda run_dir: flip_a_bit(run_dir / "model" / "weights.safetensors"),
    "half a summary": lambda run_dir: os.truncate(run_dir / "summary.json", 100),
    "a summary of another kind": lambda run_dir: (run_dir / "summary.json").write_text("[1]"),
    "a summary that is a pipe": lambda run_dir: make_a_pipe(run_dir / "summary.json"),
}


@pytest.mark.parametrize("damage", few(DAMAGES))
def test_damaged_results_are_made_again_by_the_same_command(
    damage: Callable[[Path], object], undisturbed: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(finished)
    assert run(finished) == 0
    assert "finished" not in capsys.readouterr().out
    assert weights(finished) == undisturbed
    summary = (finished / "summary.json").read_bytes()
    assert run(finished) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "summary.json").read_bytes() == summary
