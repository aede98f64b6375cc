"""Random ``kill -9``: restarted by ``accelerate launch``, two ranks must end with the undisturbed weights.

Every run is killed three times, at a random step, rank and phase, with transfers overlapping the steps in
every second one; the launcher (``--max_restarts 3``) starts it again, and it resumes from its last
checkpoint. ``steps_repeated`` counts from the step at which a rank died to the one that the next attempt
resumes from; the mean is half of the steps between checkpoints, and one or two for the checkpoint that was
being written.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.larger import RESUMED
from offload_sparse.engine.faults import PHASES, VARIABLE, Fault

KILLS, QUICK_KILLS = 100, 3
RESTARTS = 3
STEPS, LAST_KILL = 60, 45
SEED = 0
_LIMIT_SECONDS = 400.0
_OPTIONS = shlex.split(
    "train --model.name offload_sparse/mlp --model.arguments '{stream: 12, hidden: 24, depth: 1}' "
    "--data.limit 320 --data.batch_size 16 "
    f"--train.max_steps {STEPS} --train.check false --quiet true "
    "--train.eval_every 0 --train.log_every 5 --train.timeout 60 "
    "--round.k 4 --round.freeze_at 0.9 "
    "--checkpoint.every 5 --optim.lr 0.02"
)
_DEATH = re.compile(r"fault: rank (\d+) dies at step (\d+) in (\S+) of attempt (\d+)")


@dataclass(frozen=True)
class Kill:
    """A kill that took place.

    Attributes:
        step: optimizer steps done then.
        resumed: the step that the next attempt resumed from.
    """

    rank: int
    step: int
    phase: str
    attempt: int
    resumed: int


@dataclass(frozen=True)
class Outcome:
    """One run under the launcher: its kills, and whether it ended with the weights of the undisturbed one."""

    kills: tuple[Kill, ...]
    intact: bool
    seconds: float


def run(quick: bool) -> BenchResult:
    """100 kills, ``quick`` 3."""
    wanted = QUICK_KILLS if quick else KILLS
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, log, straight_seconds = launch(folder / "straight", [], "delta")
        if code:
            raise RuntimeError(f"the undisturbed run failed\n{log}")
        for number, faults in enumerate(plans(wanted)):
            outcomes.append(_disturbed(folder, number, faults))
            print(f"run {number}: {outcomes[-1]}", file=sys.stderr, flush=True)
    return _result(outcomes, straight_seconds)


def plans(kills: int, seed: int = SEED) -> Iterator[list[Fault]]:
    """The faults of each run, one per attempt, at steps that do not go back."""
    generator = random.Random(seed)
    while kills > 0:
        attempts = min(RESTARTS, kills)
        kills -= attempts
        steps = sorted(generator.randrange(1, LAST_KILL) for _ in range(attempts))
        faults = []
        for attempt, step in enumerate(steps):
            phase = generator.choice(PHASES)
            # Only the first rank commits a checkpoint.
            rank = 0 if phase == "checkpoint-commit" else generator.randrange(2)
            faults.append(Fault(phase, step, rank, attempt))
        yield faults


def launch(run_dir: Path, faults: list[Fault], transfer: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of ``accelerate launch`` on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--max_restarts", str(RESTARTS), "--main_process_port", port, "-m", "offload_sparse.cli"]
    command += [*_OPTIONS, "--round.transfer", transfer, "--run_dir", str(run_dir)]
    text = ",".join(f"kill:rank={f.rank}:step={f.step}:phase={f.phase}:restart={f.restart}" for f in faults)
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ranks}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", VARIABLE: text}
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            code = process.wait(_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace"), time.perf_counter() - begun


def kills_of(log: str) -> tuple[Kill, ...]:
    """The kills that the output of a launch tells of."""
    deaths = list(_DEATH.finditer(log))
    kills = []
    for number, death in enumerate(deaths):
        until = deaths[number + 1].start() if number + 1 < len(deaths) else len(log)
        back = RESUMED.search(log, death.end(), until)
        rank, step, phase, attempt = death.groups()
        kills.append(Kill(int(rank), int(step), phase, int(attempt), int(back[1]) if back else 0))
    return tuple(kills)


def same_weights(run_dir: Path, straight: Path) -> bool:
    """Whether both runs have exported the same bits."""
    files = [folder / "model" / "weights.safetensors" for folder in (run_dir, straight)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def _disturbed(folder: Path, number: int, faults: list[Fault]) -> Outcome:
    run_dir = folder / f"run{number}"
    code, log, seconds = launch(run_dir, faults, "overlap" if number % 2 else "delta")
    intact = code == 0 and same_weights(run_dir, folder / "straight")
    if not intact:
        print(log, file=sys.stderr, flush=True)
    return Outcome(kills_of(log), intact, seconds)


def _result(outcomes: list[Outcome], straight_seconds: float) -> BenchResult:
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    survived = sum(len(outcome.kills) for outcome in outcomes if outcome.intact)
    intact = sum(outcome.intact for outcome in outcomes)
    groups = {phase: [kill for kill in kills if kill.phase == phase] for phase in PHASES}
    groups[f"survived {survived} of {len(kills)} in {len(outcomes)} runs ({intact} intact)"] = kills
    repeated = {name: fmean(k.step - k.resumed for k in group) for name, group in groups.items() if group}
    rows = [[name, len(groups[name]), steps] for name, steps in repeated.items()]
    mean = fmean(kill.step - kill.resumed for kill in kills)
    ratios = {"faults.survived": survived / len(kills), "faults.steps_repeated": mean}
    raw = {
        "runs": [asdict(outcome) for outcome in outcomes],
        "straight_seconds": straight_seconds,
        "run_seconds": median(outcome.seconds for outcome in outcomes),
        "seed": SEED,
    }
    return BenchResult(ratios, raw, ("phase", "kills", "steps repeated, mean"), rows)
