"""Kills at every file-system call of short runs, once and twice, and losses of power: all must survive them.

A run is watched (``watched_disk``): its folder is noted as it is at every call, which is what a kill there
leaves, and as a loss of power there might leave it. From every folder that was noted the same command is
given again, in a process of its own: it must end with the bits of the run that was never disturbed. The runs
after a kill are watched in turn, for the second one. Equal folders are tried once.

All processes are forked from one that has done such a run on both tiers, which spares them what takes a
process longer the first time. In them clocks stand still, so that the same moment leaves the same folder, and
what is exported is not read back in a further process. Two ranks under a launcher are killed in ``tests/``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.larger import resumed_at
from offload_sparse.bench.options import FaultsConfig
from offload_sparse.bench.watched_disk import Tree, WatchedDisk
from offload_sparse.config.parse import RUN_OPTIONS
from offload_sparse.config.run import RunConfig
from offload_sparse.engine import timeline
from offload_sparse.export import network_file
from offload_sparse.run import log, position, trainer
from offload_sparse.run.trainer import train
from offload_sparse.store.files import write_file

_OPTIONS = shlex.split(
    "--model.name offload_sparse/mlp --model.arguments '{stream: 12, hidden: 24, depth: 1}' "
    "--data.name {images} --data.batch_size 8 --data.random_crop 2 --train.log_every 1 --train.eval_every 1 "
    "--train.max_steps 5 --train.check false --quiet true --trackers [] --round.k 2 --round.freeze_at 0.8 "
    "--policy.lr 0.05 --optim.lr 0.02 --checkpoint.every 2 --checkpoint.keep 1"
)
_FILE, _SHORT, _OTHER = ["--store.tier", "file"], ["--train.max_steps", "3"], ["--train.seed", "5"]
_KEEP, _OVER = ["--checkpoint.keep", "9"], ["--overwrite", "true"]

WAYS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "start": ({}, []),
    "start, file": ({}, _FILE),
    "overwrite": ({"it": _OTHER}, _OVER),
    "overwrite, file": ({"it": [*_OTHER, *_FILE]}, [*_OVER, *_FILE]),
    "resume another": ({"other": _KEEP}, ["--resume", "{folder}/other/checkpoints/step_00000003"]),
    "go back": ({"it": _KEEP}, ["--resume", "{folder}/it/checkpoints/step_00000002"]),
    "grow": ({"it": _SHORT}, []),
    "grow, file": ({"it": [*_SHORT, *_FILE]}, _FILE),
}
"""The runs that are there before, by name, with their options; the options of the command."""

KINDS = ("kill", "nothing", "names", "some")
"""What is left: all, by a kill, or what ``WatchedDisk.after_power_loss`` calls its kinds."""

QUICK, SECOND_KILLS = 1, 3
"""Calls of each way that ``--quick`` tries; second kills after each first one."""

_FORK = get_context("fork")
_LIMIT_SECONDS = 240
_T = TypeVar("_T")
_PLACE = b"@"
_UNREAD = re.compile(r"\.tmp(/|$)|\.lock$")
_MEASURED = ("time", "round_timeline", "_bytes", "_bytes_per_round", "_seconds")


@dataclass(frozen=True)
class Point:
    """A moment at which a run was cut off.

    Attributes:
        call: that was about to be made, or was half done.
        kind: of ``KINDS``.
        left: digest of the folder.
    """

    call: str
    kind: str
    left: str


@dataclass
class Attempt:
    """One process that was given a command.

    Attributes:
        said: what it printed, an error last.
        ended: what must be equal to the undisturbed run (weights, log, figures); nothing if it did not end.
        points: where it could have been cut off, if it was watched; the last one is its end."""

    said: str = ""
    ended: Any = None
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """A command, and the digest of the folder that it finds; what it is watched for."""

    found: str
    arguments: Sequence[str]
    kinds: Sequence[str] = ()


@dataclass
class Swept:
    """What became of one way to start a run.

    Attributes:
        points: number of them by kind; ``twice`` are those in runs that had been killed before.
        survived: of these.
        runs: that were made, each from another folder.
        lost: what went wrong, in words.
        steps_lost: of a loss of power, beside a kill at the same call; the most.
    """

    way: str
    points: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    steps_lost: int = 0

    def count(self, kind: str, wrong: str, *points: Point) -> None:
        self.points[kind] += 1
        self.survived[kind] += not wrong
        if wrong:
            self.lost.append(f"{kind}: {', then '.join(point.call for point in points)}: {wrong}")


def run(config: FaultsConfig) -> BenchResult:
    """Every point of every way; ``quick`` a sample, and without the second kill."""
    found = []
    sample, twice = (QUICK, 0) if config.quick else (None, SECOND_KILLS)
    with tempfile.TemporaryDirectory(prefix="faults") as folder, Sweep(Path(config.cache or folder)) as sweep:
        for way in WAYS:
            found.append(sweep.way(way, sample, twice))
            print(found[-1], file=sys.stderr, flush=True)
    return _result(found)


class Sweep:
    """Tries ways to start a run. A context manager.

    Args:
        folder: for everything that is left of runs, and for what became of each, so that none is made twice.
        processes: at a time; as many as there are cores unless given.
    """

    def __init__(self, folder: Path, processes: int = 0) -> None:
        self._folder = folder.resolve()
        self._processes = processes or len(os.sched_getaffinity(0))

    def __enter__(self) -> Sweep:
        for name in ("left", "ended"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        if not (self._folder / "images").exists():
            _write_images(self._folder / "images")
        self._asked, asked = _FORK.Pipe()
        self._forking = _FORK.Process(target=self._serve, args=(asked,))
        self._forking.start()
        asked.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.close()
        self._forking.join()

    def way(self, name: str, sample: int | None = None, twice: int = 0) -> Swept:
        """Cut the command of a way off everywhere, and give it again.

        Args:
            name: of ``WAYS``.
            sample: calls that are tried, spread evenly; all unless given.
            twice: points of each run that resumes after a kill at which it is killed again.
        """
        swept, (before, options) = Swept(name), WAYS[name]
        found = self._keep({})
        for run, more in before.items():
            found = self._undisturbed(_Task(found, self._command(run, more), ["kill"])).points[-1].left
        command = self._command("it", options)
        straight = self._undisturbed(_Task(found, command, KINDS))
        calls = _calls(straight.points)
        calls = calls if sample is None else _spread(calls, sample)
        chosen = [point for call in calls for point in call]
        once = self._resume(chosen, command, ["kill"] if twice else [])
        pairs = [
            (point, second)
            for number, point in enumerate(call[0] for call in calls)
            if twice
            for second in _spread(once[point.left].points, twice, number)
        ]
        again = self._resume([second for _, second in pairs if second.left not in once], command, [])
        wrong = {left: _difference(attempt, straight) for left, attempt in (once | again).items()}
        for point in chosen:
            swept.count(point.kind, wrong[point.left], point)
        for point, second in pairs:
            swept.count("twice", wrong[second.left], point, second)
        swept.runs = len(wrong)
        steps = [[resumed_at(once[point.left].said) for point in call] for call in calls]
        swept.steps_lost = max(after_kill - min(others) for after_kill, *others in steps)
        return swept

    def _undisturbed(self, task: _Task) -> Attempt:
        (attempt,) = self._attempts([task])
        if attempt.ended is None:
            raise RuntimeError(f"the undisturbed run failed\n{attempt.said}")
        return attempt

    def _resume(
        self, points: Sequence[Point], command: Sequence[str], kinds: Sequence[str]
    ) -> dict[str, Attempt]:
        """The command from every folder, those after a kill watched for ``kinds``."""
        after_kill = {point.left for point in points if point.kind == "kill"}
        lefts = list(dict.fromkeys(point.left for point in points))
        tasks = [_Task(left, command, kinds if left in after_kill else ()) for left in lefts]
        return dict(zip(lefts, self._attempts(tasks), strict=True))

    def _command(self, run: str, options: Sequence[str]) -> list[str]:
        words = [*_OPTIONS, "--run_dir", f"{{folder}}/{run}", *options]
        return [word.replace("{images}", str(self._folder / "images")) for word in words]

    # --- processes ---

    def _attempts(self, tasks: Sequence[_Task]) -> list[Attempt]:
        self._asked.send(tasks)
        return list(self._asked.recv())

    def _serve(self, asked: Connection) -> None:
        """The process that all others are forked from."""
        self._asked.close()
        self._warm()
        with suppress(EOFError):
            while True:
                asked.send(self._all(asked.recv()))

    def _warm(self) -> None:
        """Do everything once, and keep it from the collector, so that forked processes share it."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            for tier in ([], _FILE):
                words = [word.replace("{folder}", folder) for word in self._command("".join(tier), tier)]
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    train(_parsed(tuple(words)))
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        gc.freeze()

    def _all(self, tasks: Sequence[_Task]) -> list[Attempt]:
        """Every task in a process of its own, but for those that have ended before."""
        free = [self._folder / f"slot{number}" for number in range(self._processes)]
        running: dict[Any, tuple[Any, Path]] = {}

        def await_one() -> None:
            process, slot = running.pop(wait(list(running))[0])
            process.join()
            free.append(slot)

        for task in (task for task in tasks if not self._ended(task).exists()):
            if not free:
                await_one()
            slot = free.pop()
            config = _parsed(tuple(word.replace("{folder}", str(slot)) for word in task.arguments))
            process = _FORK.Process(target=self._perform, args=(task, config, slot))
            process.start()
            running[process.sentinel] = process, slot
        while running:
            await_one()
        return [self._attempt(task) for task in tasks]

    def _attempt(self, task: _Task) -> Attempt:
        ended = self._ended(task)
        return pickle.loads(ended.read_bytes()) if ended.exists() else Attempt(said="the process died")

    def _perform(self, task: _Task, config: RunConfig, slot: Path) -> None:
        """In a process of its own, whose clocks stand still."""
        signal.alarm(_LIMIT_SECONDS)
        torch.set_num_threads(1)
        _lay_out(pickle.loads((self._folder / "left" / task.found).read_bytes()), slot)
        attempt, output = Attempt(), slot.with_suffix(".output")
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        _stop_clocks()

        def note(call: str, disk: WatchedDisk) -> None:
            for kind in task.kinds:
                tree = disk.as_it_is() if kind == "kill" else disk.after_power_loss(kind, len(attempt.points))
                attempt.points.append(Point(call, kind, self._keep(tree, slot)))

        os.fsync = lambda _: None  # type: ignore[assignment]  # a run to its end needs none
        disk = WatchedDisk(slot, note) if task.kinds else None
        try:
            train(config)
            attempt.ended = outcome(slot / "it") if (slot / "it").is_dir() else {}
        except BaseException:
            traceback.print_exc()
        if disk is not None:
            disk.point("the end", str(slot / "it"))
        attempt.said = output.read_text(errors="replace")
        write_file(self._ended(task), pickle.dumps(attempt))

    def _ended(self, task: _Task) -> Path:
        """Where it is kept what became of a task."""
        return self._folder / "ended" / hashlib.blake2b(repr(task).encode(), digest_size=12).hexdigest()

    def _keep(self, tree: Tree, slot: Path | None = None) -> str:
        """The digest of a tree, which is kept under it: equal in every slot, whoever held the locks, and
        whatever is in files that are being written, which no start reads.
        """
        place = str(slot or "").encode()
        tree = {name: held and held.replace(place, _PLACE * len(place)) for name, held in tree.items()}
        seen = {name: held and (b"" if _UNREAD.search(name) else held) for name, held in sorted(tree.items())}
        path = self._folder / "left" / hashlib.blake2b(pickle.dumps(seen), digest_size=12).hexdigest()
        if not path.exists():
            write_file(path.with_suffix(f".{os.getpid()}"), pickle.dumps(tree))
            path.with_suffix(f".{os.getpid()}").rename(path)
        return path.name


_parsed = cache(RUN_OPTIONS.parse)


def _lay_out(tree: Tree, slot: Path) -> None:
    shutil.rmtree(slot, ignore_errors=True)
    slot.mkdir()
    place = str(slot).encode()
    for name, content in tree.items():  # a folder stands before what is in it
        if content is None:
            (slot / name).mkdir()
        else:
            (slot / name).write_bytes(content.replace(_PLACE * len(place), place))


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must be equal: every weight, the figures, the lines of the log."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = (run_dir / "model" / "weights.safetensors").read_bytes()
    return {
        "weights": hashlib.blake2b(weights).hexdigest(),
        "log": [{k: v for k, v in line.items() if not k.endswith(_MEASURED)} for line in lines],
        "loss": json.loads((run_dir / "summary.json").read_text())["test_loss"],
    }


def _difference(attempt: Attempt, straight: Attempt) -> str:
    if attempt.ended is None:
        return attempt.said.strip().splitlines()[-1]
    return ", ".join(
        f"another {name}" for name, value in straight.ended.items() if attempt.ended[name] != value
    )


def _calls(points: list[Point]) -> list[list[Point]]:
    """The points of each call, one of each kind."""
    return [points[at : at + len(KINDS)] for at in range(0, len(points), len(KINDS))]


def _spread(points: list[_T], count: int, number: int = 0) -> list[_T]:
    """So many of them, evenly; for another ``number`` others."""
    shift = (0.5 + number * 0.381966) % 1
    return [points[int((i + shift) / count * len(points))] for i in range(count)]


def _write_images(folder: Path) -> None:
    for number in range(36):
        place = folder / ("train" if number < 24 else "test") / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.effect_noise((8, 8), 40 + 40 * (number % 2))
        image.save(place / f"{number}.png")


def _stop_clocks() -> None:
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: 0.0)
    for module in (log, position, timeline):
        module.time = clock  # type: ignore[attr-defined]
    trainer.process_bytes = lambda *_: 0
    network_file.compare = lambda *_: 0.0


def _result(found: Sequence[Swept]) -> BenchResult:
    points: Counter[str] = sum((swept.points for swept in found), Counter())
    survived: Counter[str] = sum((swept.survived for swept in found), Counter())
    kills, losses = ("kill", "twice"), KINDS[1:]
    columns = ("kill", "twice", *losses)
    rows = [
        [swept.way, *(f"{swept.survived[kind]} of {swept.points[kind]}" for kind in columns), swept.runs]
        for swept in found
    ]
    ratios = {
        "faults.points": sum(points[kind] for kind in kills),
        "faults.survived": sum(survived[kind] for kind in kills) / sum(points[kind] for kind in kills),
        "faults.power_loss": sum(survived[kind] for kind in losses) / sum(points[kind] for kind in losses),
    }
    header = ("way", "killed", "killed twice", *(f"power loss, {kind}" for kind in losses), "runs")
    return BenchResult(ratios, [vars(swept) for swept in found], header, rows)
