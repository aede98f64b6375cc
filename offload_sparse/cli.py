"""``offload-sparse``: train, evaluate, verify, bench.

Each command reads its options first and imports what it needs afterwards, so that help and mistakes in the
command line never wait for torch.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offload_sparse import arguments
from offload_sparse.arguments import Options
from offload_sparse.bench.options import BenchConfig, options_of
from offload_sparse.command import run_command
from offload_sparse.config import DataConfig, Residual, RunConfig

if TYPE_CHECKING:
    from torch import nn

    from offload_sparse.structure.coverage import Outcome
    from offload_sparse.training.evaluation import Evaluation

PROGRAM = "offload-sparse"


@dataclass
class EvaluateConfig:
    """Measure accuracy and loss of the network that a run has exported.

    Attributes:
        path: run folder, or the folder ``model/`` of a run.
        split: which images to measure on, as the run's configuration names them.
        json: print one JSON object instead of a table.
        data: which images are read; values that are not given are those of the run.
    """

    path: Path
    split: Literal["test", "train", "validation"] = "test"
    json: bool = False
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class VerifyConfig:
    """Check on a random mask that the narrow network equals the masked full network, in float64.

    Attributes:
        model: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        all: check a table of networks of many families instead; only ``rho``, ``seed`` and ``json`` count.
        rho: probability that a channel is kept, in (0, 1].
        residual: what is sampled on residual streams.
        image_size: side of the images in pixels; 0 takes 32 for networks of this package and 64 for others.
        in_channels: channels of the images; 0 takes 3.
        num_classes: outputs of the network.
        seed: seed of the mask and of the network's random weights.
        json: print one JSON object instead of a table.
    """

    model: str = ""
    all: bool = False
    rho: float = 0.5
    residual: Residual = "coupled"
    image_size: int = 0
    in_channels: int = 0
    num_classes: int = 10
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        if bool(self.model) == self.all:
            raise ValueError(
                "--model is missing; name one, or give --all"
                if not self.all
                else "--model and --all exclude each other; give one of them"
            )
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; give a ratio in (0, 1], such as 0.25")
        for name, least in (("image_size", 0), ("in_channels", 0), ("num_classes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give {least} or more")


@dataclass
class PlanConfig(RunConfig):
    """Say what a run would take and whether it fits, before anything is allocated.

    Attributes:
        gpus: ranks of the run, one CUDA device each, all on one machine; 0 plans for this machine's device.
        device_memory: memory of each device, such as 24GiB; empty takes what this machine has free.
        host_memory: host memory that the ranks share, such as 256GiB; empty takes what is available here.
        largest_width: look for the largest factor on the network's channels that fits (takes longer).
        json: file to write the figures to, as one JSON object.
    """

    gpus: int = 0
    device_memory: str = ""
    host_memory: str = ""
    largest_width: bool = True
    json: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; give the number of ranks, or 0 for this machine's device")


_PLAN = Options(
    PlanConfig,
    f"{PROGRAM} plan",
    f"{PROGRAM} plan --config configs/quickstart.yaml --gpus 4 --device_memory 24GiB --host_memory 256GiB",
    reads_files=True,
)
_EVALUATE = Options(
    EvaluateConfig, f"{PROGRAM} evaluate", f"{PROGRAM} evaluate runs/quickstart --json", positional=("path",)
)
_VERIFY = Options(
    VerifyConfig, f"{PROGRAM} verify", f"{PROGRAM} verify --model torchvision/resnet18 --rho 0.25 --json"
)


def train(argv: Sequence[str]) -> int:
    """Train a network as a configuration says; the same as launch/train.py."""
    config = arguments.parse(argv)
    if config.dry_run:
        return _dry_run(config)
    from offload_sparse.training.trainer import train as run

    run(config)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Measure accuracy and loss of the network that a run has exported."""
    path = _EVALUATE.parse(argv).path
    config = _EVALUATE.parse(argv, defaults=_data_of_run(path))
    result = _evaluate(config)
    figures = {
        "path": str(path),
        "dataset": config.data.name,
        "split": config.split,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "images": result.count,
    }
    _show(figures, config.json)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check that a model, narrowed, equals the full one with dropped channels masked; exit code 1 if not."""
    config = _VERIFY.parse(argv)
    if config.all:
        return _verify_all(config)
    figures = _verify(config)
    _show(figures, config.json)
    return 0 if figures["ok"] else 1


def bench(argv: Sequence[str]) -> int:
    """Measure one of the figures that the README quotes, or list them."""
    tree = options_of(argv)
    example = f"{PROGRAM} bench memory --json memory.json"
    config = Options(tree, f"{PROGRAM} bench", example, positional=("name",)).parse(argv)
    from offload_sparse.bench import contract

    if not config.name:
        for name, line in contract.available().items():
            print(f"{name:<16}{line}")
        return 0
    run = contract.load(config.name)
    result = run(config.quick) if type(config) is BenchConfig else run(config.quick, config)
    contract.print_result(result, config.name)
    if config.json:
        contract.write(result, shlex.join([PROGRAM, "bench", *argv]), Path(config.json))
    return 0


def plan(argv: Sequence[str]) -> int:
    """Say what a run would take in memory and over the bus, and whether it fits; exit code 1 if not."""
    names = {f"--{n.replace('_', '-')}": f"--{n}" for n in ("device_memory", "host_memory", "largest_width")}
    config = _PLAN.parse([names.get(n, n) + e + v for n, e, v in (token.partition("=") for token in argv)])
    figures = _plan(config)
    if config.json:
        _write_json(figures, Path(config.json))
    _show({name: _readable(name, value) for name, value in figures.items()}, json_wanted=False)
    return 0 if figures["fits"] else 1


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "plan": plan,
    "verify": verify,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program: dispatch to a command.

    Returns:
        Exit code: that of the command, or 2 for bad input, told in one line on stderr.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(given))


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(importlib.metadata.version(PROGRAM))
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        advice = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {argv[0]}; {advice}")
    return command(argv[1:])


def _help() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--KEY VALUE ...]",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists a command's options. `--version` prints the version.",
            "",
            f"example: {PROGRAM} train --config configs/quickstart.yaml --policy.rho 0.1",
        ]
    )


def _model_folder(path: Path) -> Path:
    return path / "model" if (path / "model").is_dir() else path


def _data_of_run(path: Path) -> dict[str, Any]:
    """The data section of the run that ``path`` belongs to, by dotted name; empty without a config.yaml."""
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file():
            return arguments.flat_values(arguments.parse(["--config", str(folder / "config.yaml")]), "data")
    return {}


def _dry_run(config: RunConfig) -> int:
    from rich.console import Console

    from offload_sparse.training.dry_run import dry_run, dry_run_table

    table = dry_run_table(dry_run(config))
    if os.environ.get("RANK", "0") == "0":
        Console().print(table)
    return 0


def _plan(config: PlanConfig) -> dict[str, Any]:
    import torch

    from offload_sparse.planning.fit import figures
    from offload_sparse.planning.machine import Machine, parse_bytes, this_machine

    here = this_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), max(1, config.gpus))
    device = here.device
    if config.device_memory:
        device = parse_bytes(config.device_memory, "device_memory")
    elif config.gpus and device is None:
        raise ValueError("this machine has no CUDA device to plan for; give --device_memory, such as 24GiB")
    host = parse_bytes(config.host_memory, "host_memory") if config.host_memory else here.host
    machine = Machine(max(1, config.gpus), max(1, config.gpus), host, device)
    return figures(config, machine, config.largest_width)


def _readable(name: str, value: Any) -> Any:
    """Bytes as GiB, or MiB where that is less than a hundredth."""
    if not name.partition("_per_")[0].endswith("bytes") or value is None:
        return "none" if value is None else value
    return f"{value / 2**30:.3f} GiB" if value >= 2**30 / 100 else f"{value / 2**20:.3f} MiB"


def _write_json(figures: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _evaluate(config: EvaluateConfig) -> Evaluation:
    import torch

    from offload_sparse.data.loader import EvalLoader
    from offload_sparse.data.normalise import Normalise
    from offload_sparse.data.source import load_splits
    from offload_sparse.engine.finalize import load_pruned, read_structure
    from offload_sparse.training import evaluation

    folder = _model_folder(config.path)
    preprocessing = read_structure(folder)["preprocessing"]
    if not {"mean", "std"} <= set(preprocessing):
        raise ValueError(f"{folder} does not say how its images are normalised; evaluate it in your own loop")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_pruned(folder).to(device)
    split = getattr(load_splits(config.data), config.split)
    if split is None:
        raise ValueError("no validation images; set --data.validation_split or --data.validation_size")
    mean, std = preprocessing["mean"], preprocessing["std"]
    normalise = Normalise(mean, std, next(network.parameters()).dtype).to(device)
    loader = EvalLoader(split, config.data, channels=len(mean))
    return evaluation.evaluate(network, loader, normalise, device)


def _verify(config: VerifyConfig) -> dict[str, Any]:
    import torch

    from offload_sparse.models import build_model
    from offload_sparse.structure.discovery import discover
    from offload_sparse.structure.subnet import build_on_meta
    from offload_sparse.structure.verify import TOLERANCE
    from offload_sparse.structure.verify import verify as compare

    size = config.image_size or (32 if config.model.startswith("offload_sparse/") else 64)
    channels = config.in_channels or 3

    def build() -> torch.nn.Module:
        return build_model(config.model, config.num_classes, channels, size)

    start = time.perf_counter()
    model, inputs = build_on_meta(build), (torch.empty(2, channels, size, size, device="meta"),)
    channel_map = discover(model, inputs, config.residual)
    discover_seconds = time.perf_counter() - start
    result = compare(build, inputs, channel_map, config.rho, config.seed)
    return {
        "model": config.model,
        "rho": config.rho,
        "residual": config.residual,
        "atoms": result.atoms,
        "groups": len(channel_map.groups),
        "kept": result.kept,
        "output_error": max(result.train_error, result.eval_error),
        "gradient_error": result.gradient_error,
        "worst": result.worst,
        "discover_seconds": discover_seconds,
        "verify_seconds": result.seconds,
        "ok": bool(result.error <= TOLERANCE),  # NaN fails too
    }


def _verify_all(config: VerifyConfig) -> int:
    """The table of ``--all``; exit code 1 if a network that is known to pass does not."""
    from offload_sparse.models import build_model
    from offload_sparse.structure import coverage

    def build(case: coverage.Case) -> nn.Module:
        return build_model(case.name, num_classes=10, in_channels=3, image_size=case.size, **case.arguments)

    start, outcomes = time.perf_counter(), []
    if not config.json:
        print(_ROW.format("model", "streams", "atoms", "groups", "discover", "output", "gradient", ""))
    for outcome in coverage.cover(build, coverage.CASES, rho=config.rho, seed=config.seed):
        outcomes.append(outcome)
        if not config.json:
            print(_row(outcome), flush=True)
    accepted = sum(outcome.accepted for outcome in outcomes)
    summary = {
        "accepted": accepted,
        "refused": len(outcomes) - accepted,
        "ok": all(outcome.accepted for outcome in outcomes if outcome.case.accepted),
        "seconds": time.perf_counter() - start,
    }
    if config.json:
        _show(summary | {"models": [outcome.figures() for outcome in outcomes]}, json_wanted=True)
    else:
        _show(summary, json_wanted=False)
    return 0 if summary["ok"] else 1


_ROW = "{:<36}{:<10}{:>7}{:>8}{:>10}{:>10}{:>10}  {}"


def _row(outcome: Outcome) -> str:
    figures = outcome.figures()
    seconds = f"{outcome.discover_seconds:.1f} s"
    errors = ["" if figures[k] is None else f"{figures[k]:.0e}" for k in ("output_error", "gradient_error")]
    reason = f"refused: {outcome.reason}" if outcome.reason else ""
    return _ROW.format(
        outcome.case.name, outcome.residual, outcome.atoms, outcome.groups, seconds, *errors, reason
    )


def _show(figures: Mapping[str, Any], json_wanted: bool) -> None:
    """Figures on stdout, as one JSON object or as a table."""
    if json_wanted:
        from offload_sparse.training.recorder import json_value

        print(json.dumps(json_value(figures), allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
