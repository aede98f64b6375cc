"""The same command resumes: whatever way a run was started and wherever it was killed, the same command ends
with the bits of the run that was not.

Kills are counted in calls that change a folder or wait for the disk (``os.replace``, ``os.fsync``, …).
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.run import killed_run
from tests.support.fork_server import ForkServer

FILE = ["--store.tier", "file"]
SHORT, OTHER = ["--train.max_steps", "6"], ["--train.seed", "5"]
KEEP = ["--checkpoint.keep", "9"]

# way: (options of the runs that are there before, by name; options of the command)
WAYS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "new": ({}, []),
    "new_file": ({}, FILE),
    "overwrite": ({"it": OTHER}, ["--overwrite", "true"]),
    "overwrite_file": ({"it": [*OTHER, *FILE]}, ["--overwrite", "true", *FILE]),
    "from_another": ({"other": KEEP}, ["--resume", "{folder}/run_other/checkpoints/step_00000006"]),
    "back": ({"it": KEEP}, ["--resume", "{folder}/run_it/checkpoints/step_00000006"]),
    "longer": ({"it": SHORT}, []),
    "longer_file": ({"it": [*SHORT, *FILE]}, FILE),
}
QUICK = 3
"""Kill points of each way that are tried every time, spread over the run."""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(killed_run.MODULES) as server:
        yield server


@pytest.fixture(scope="module")
def prepared(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder before the command of a way, what the undisturbed command leaves there, and its calls."""

    @cache
    def made(way: str) -> tuple[Path, dict[str, Any], int]:
        before = tmp_path_factory.mktemp(way)
        for name, options in WAYS[way][0].items():
            codes, log = killed_run.run(server, before, name, 1, options)
            assert codes == [0], log
        after = copied(before, tmp_path_factory.mktemp(way) / "after")
        command = options_of(way, after)
        codes, log = killed_run.run(server, after, "it", 1, command, kill_at=0)
        assert codes == [0], log
        return before, outcome(after), int((after / "it.calls").read_text())

    return made


def copied(before: Path, folder: Path) -> Path:
    """The runs in another folder, whose names their files say."""
    shutil.copytree(before, folder)
    for name in ("config.yaml", "store.json"):
        for path in folder.rglob(name):
            path.write_text(path.read_text().replace(str(before), str(folder)))
    return folder


def options_of(way: str, folder: Path) -> list[str]:
    return [option.format(folder=folder) for option in WAYS[way][1]]


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: every weight, the figures, the lines of the log."""
    run_dir = folder / "run_it"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = ("time", "round_timeline", "_bytes", "_bytes_per_round", "_seconds")
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "weights": (run_dir / "model" / "weights.safetensors").read_bytes(),
        "lines": [{k: v for k, v in line.items() if not k.endswith(measured)} for line in lines],
        "loss": summary["test_loss"],
    }


def points() -> Iterator[Any]:
    for way in WAYS:
        for number in range(40):
            quick = number < QUICK
            yield pytest.param(way, number, marks=() if quick else pytest.mark.slow, id=f"{way}-{number}")


@pytest.mark.parametrize(("way", "number"), points())
def test_the_same_command_ends_with_the_same_bits(
    way: str, number: int, server: ForkServer, prepared: Any, tmp_path: Path
) -> None:
    before, expected, calls = prepared(way)
    at = 1 + (number * 0.381966 + 0.2) % 1 * calls  # spread evenly, however many are tried
    folder = copied(before, tmp_path / "copy")
    codes, log = killed_run.run(server, folder, "it", 1, options_of(way, folder), kill_at=int(at))
    assert codes == [-signal.SIGKILL], log
    codes, log = killed_run.run(server, folder, "it", 1, options_of(way, folder))
    assert codes == [0], f"killed before call {int(at)} of {calls}\n{log}"
    assert outcome(folder) == expected, f"killed before call {int(at)} of {calls}"
