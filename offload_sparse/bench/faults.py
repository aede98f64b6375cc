"""Random ``kill -9``: restarted by ``accelerate launch``, two ranks must end with the undisturbed weights.

Every run is killed three times, at a random step, rank and phase, with transfers overlapping the steps in
every second one; the launcher (``--max_restarts 3``) starts it again, and it carries on from its last
checkpoint. Launcher, restarts and ranks are real. Only the import of torch is done once, by a server that
the ranks are forked from (see ``bench.fork_server``), since it takes longer than the run.
``steps_repeated`` counts from the step at which a rank died to the one that the next attempt carries on
from; the mean is half of the steps between checkpoints, and one or two for the checkpoint that was being
written.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from offload_sparse.bench import fork_server
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.fork_server import ForkServer
from offload_sparse.engine.faults import PHASES, VARIABLE, Fault

KILLS, QUICK_KILLS = 100, 3
RESTARTS = 3
STEPS, LAST_KILL = 60, 45
SEED = 0
_LIMIT_SECONDS = 400.0
_MODULES = (
    *("offload_sparse.run.trainer", "offload_sparse.methods.sparse_offload", "offload_sparse.cli"),
    *("accelerate", "torch_pruning", "safetensors.torch", "torch.distributed.checkpoint"),
)
_OPTIONS = (
    *(
        "train",
        "--model.name",
        "offload_sparse/mlp",
        "--model.arguments",
        "{stream: 12, hidden: 24, depth: 1}",
    ),
    *("--data.train_limit", "320", "--data.test_limit", "32", "--data.batch_size", "16"),
    *("--train.max_steps", str(STEPS), "--train.verify", "false", "--train.check_plan", "false"),
    *(
        "--train.progress",
        "false",
        "--train.eval_every",
        "0",
        "--train.log_every",
        "5",
        "--train.timeout",
        "60",
    ),
    *("--round.k", "4", "--round.freeze_at", "0.9", "--final.candidates", "2", "--final.bn_batches", "1"),
    *("--checkpoint.every_steps", "5", "--checkpoint.best", "false", "--optim.lr", "0.02"),
)
_DEATH = re.compile(r"fault: rank (\d+) dies at step (\d+) in (\S+) of attempt (\d+)")
_RETURN = re.compile(r"carrying on at step (\d+)")


@dataclass(frozen=True)
class Kill:
    """A kill that took place.

    Attributes:
        step: optimizer steps done then.
        resumed: the step that the next attempt carried on from.
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
    with ForkServer(_MODULES) as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, log, straight_seconds = launch(server, folder / "straight", [], "off")
        if code:
            raise RuntimeError(f"the undisturbed run failed\n{log}")
        for number, faults in enumerate(plans(wanted)):
            outcomes.append(_disturbed(server, folder, number, faults))
            _tell(outcomes)
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


def launch(server: ForkServer, run_dir: Path, faults: list[Fault], overlap: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of ``accelerate launch`` on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--max_restarts", str(RESTARTS), "--main_process_port", port, fork_server.__file__]
    command += [server.address, "offload_sparse.cli.main:main", *_OPTIONS]
    command += ["--round.overlap", overlap, "--run_dir", str(run_dir)]
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
        back = _RETURN.search(log, death.end(), until)
        rank, step, phase, attempt = death.groups()
        kills.append(Kill(int(rank), int(step), phase, int(attempt), int(back[1]) if back else 0))
    return tuple(kills)


def same_weights(run_dir: Path, straight: Path) -> bool:
    """Whether both runs have exported the same bits."""
    files = [folder / "model" / "weights.safetensors" for folder in (run_dir, straight)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def _disturbed(server: ForkServer, folder: Path, number: int, faults: list[Fault]) -> Outcome:
    run_dir = folder / f"run{number}"
    code, log, seconds = launch(server, run_dir, faults, "on" if number % 2 else "off")
    intact = code == 0 and same_weights(run_dir, folder / "straight")
    if not intact:
        print(log, file=sys.stderr, flush=True)
    return Outcome(kills_of(log), intact, seconds)


def _tell(outcomes: list[Outcome]) -> None:
    kills = sum(len(outcome.kills) for outcome in outcomes)
    intact = sum(outcome.intact for outcome in outcomes)
    print(f"{len(outcomes)} runs, {intact} intact, {kills} kills", file=sys.stderr, flush=True)


def _result(outcomes: list[Outcome], straight_seconds: float) -> BenchResult:
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    survived = sum(len(outcome.kills) for outcome in outcomes if outcome.intact)
    ratios = {
        "faults.survived": survived / len(kills),
        "faults.steps_repeated": fmean(kill.step - kill.resumed for kill in kills),
    }
    by_phase = Counter(kill.phase for kill in kills)
    rows: list[list[Any]] = [
        [phase, by_phase[phase], _repeated([k for k in kills if k.phase == phase])]
        for phase in PHASES
        if by_phase[phase]
    ]
    intact = sum(outcome.intact for outcome in outcomes)
    rows.append(
        [
            f"survived {survived} of {len(kills)} in {len(outcomes)} runs ({intact} intact)",
            len(kills),
            _repeated(kills),
        ]
    )
    raw = {
        "runs": [asdict(outcome) for outcome in outcomes],
        "straight_seconds": straight_seconds,
        "run_seconds": median(outcome.seconds for outcome in outcomes),
        "seed": SEED,
    }
    return BenchResult(ratios, raw, ("phase", "kills", "steps repeated, mean"), rows)


def _repeated(kills: list[Kill]) -> float:
    return fmean(kill.step - kill.resumed for kill in kills)
