"""The commands that read the configuration of a run: ``train``, ``plan`` and ``config``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_sparse.cli.table import show
from offload_sparse.config import yaml_text
from offload_sparse.config.parse import PROGRAM, RUN_OPTIONS, Options, dump
from offload_sparse.config.run import RunConfig, resolve
from offload_sparse.store.lock import lock_folder


def train(argv: Sequence[str]) -> int:
    """Train a network as a configuration says; the same as launch/train.py."""
    config = RUN_OPTIONS.parse(argv)
    if config.dry_run:
        return _dry_run(config)
    # Before anything slow is imported: a folder that is in use is known at once.
    first = os.environ.get("RANK", "0") == "0"
    if first and not config.quiet and _searches_as_the_paper(config):
        print(PAPER_NOTE, file=sys.stderr)
    with lock_folder(config.run_dir) if first else nullcontext():
        from offload_sparse.run.trainer import train as run

        run(config)
    return 0


PAPER_NOTE = (
    "the paper's search measured below static here (76.3 against 84.2 %: VGG-19, CIFAR-10, 40 epochs); for "
    "the default search add --config configs/default_search.yaml"
)


def _searches_as_the_paper(config: RunConfig) -> bool:
    is_of_it = str(config.paper.get("source", "")).startswith("Zhou et al. 2021")
    draws = config.policy.search == "sampled" and config.policy.sampler == "bernoulli"
    return is_of_it and config.method == "sparse_offload" and draws


def _dry_run(config: RunConfig) -> int:
    import torch

    from offload_sparse.run.plan.dry_run import dry_run, dry_run_table
    from offload_sparse.run.terminal import console

    config = resolve(config, "cuda" if torch.cuda.is_available() else "cpu")
    table = dry_run_table(dry_run(config))
    if os.environ.get("RANK", "0") == "0":
        console().print(table)
    return 0


@dataclass
class PlanConfig(RunConfig):
    """Say what a run would take and whether it fits, before anything is allocated.

    Attributes:
        gpus: ranks of the run, one CUDA device each, all on one machine; 0 plans for this machine's device.
        device_memory: memory of each device, such as 24GiB; empty takes what this machine has free.
        host_memory: host memory that the ranks share, such as 256GiB; empty takes what is available here.
        json: file to write the figures to, as one JSON object.
    """

    gpus: int = 0
    device_memory: str = ""
    host_memory: str = ""
    json: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; give the number of ranks, or 0 for this machine's device")


def plan(argv: Sequence[str]) -> int:
    """Say what a run would take in memory and over the bus, beside other methods; 1 if it does not fit."""
    examples = (
        f"{PROGRAM} plan --config configs/quickstart.yaml",
        f"{PROGRAM} plan --config configs/quickstart.yaml --gpus 4 --device-memory 24GiB",
        f"{PROGRAM} plan --config configs/quickstart.yaml --method dense",
    )
    config = Options(PlanConfig, f"{PROGRAM} plan", examples, reads_files=True).parse(argv)
    figures = _plan(config)
    if config.json:
        path = Path(config.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    beside = figures.pop("beside")
    shown = {name: _readable(name, value) for name, value in figures.items() if value != ""}
    show(shown, json_wanted=False)
    _show_beside(beside, int(figures["ranks"]))
    return 0 if figures["fits"] else 1


def _plan(config: PlanConfig) -> dict[str, Any]:
    import torch

    from offload_sparse.run.plan.fit import figures
    from offload_sparse.run.plan.machine import Machine, parse_bytes, this_machine

    here = this_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), max(1, config.gpus))
    device = here.device
    if config.device_memory:
        device = parse_bytes(config.device_memory, "device_memory")
    elif config.gpus and device is None:
        raise ValueError("this machine has no CUDA device to plan for; give --device_memory, such as 24GiB")
    host = parse_bytes(config.host_memory, "host_memory") if config.host_memory else here.host
    machine = Machine(max(1, config.gpus), max(1, config.gpus), host, device)
    return figures(config, machine, lambda what: print(f"planning: {what}", file=sys.stderr, flush=True))


def _show_beside(beside: Mapping[str, Mapping[str, Any]], ranks: int) -> None:
    """What a rank takes by each method, side by side."""
    from rich.table import Table

    from offload_sparse.run.terminal import console

    table = Table("", *beside, title=f"memory of each of {ranks} ranks")
    rows = {
        "device": "device_bytes",
        "  weights, gradients, slots": "device_subnet_bytes",
        "  activations, batches": "device_activation_bytes",
        "host": "host_bytes",
        "  store": "host_store_bytes",
        "files": "file_bytes",
        "fits": "fits",
    }
    for label, name in rows.items():
        values = [figures[name] for figures in beside.values()]
        table.add_row(label, *(("yes" if v else "no") if name == "fits" else _size(v) for v in values))
    console().print(table)


def _readable(name: str, value: Any) -> Any:
    """Bytes as GiB, or MiB where that is less than a hundredth."""
    if not name.partition("_per_")[0].endswith("bytes") or value is None:
        return "none" if value is None else value
    return _size(value)


def _size(value: float) -> str:
    return f"{value / 2**30:.3f} GiB" if value >= 2**30 / 100 else f"{value / 2**20:.3f} MiB"


@dataclass
class ConfigConfig(RunConfig):
    """Print the configuration that files and options come to; a run resolves auto for its device.

    Attributes:
        markdown: print the reference of all options instead.
    """

    markdown: bool = False


def config(argv: Sequence[str]) -> int:
    """Print what files and options come to, or the reference of all options."""
    examples = (
        f"{PROGRAM} config --config configs/quickstart.yaml --policy.rho 0.1",
        f"{PROGRAM} config --markdown > configs/REFERENCE.md",
    )
    found = Options(ConfigConfig, f"{PROGRAM} config", examples, reads_files=True).parse(argv)
    plain = RunConfig(**{f.name: getattr(found, f.name) for f in dataclasses.fields(RunConfig)})
    print(_reference() if found.markdown else dump(plain), end="")
    return 0


_INTRODUCTION = f"""# Every option

Written by `{PROGRAM} config --markdown`; change the dataclasses, not this file. A YAML file names what it
changes, by sections (`policy:` and below it `rho: 0.1`) or by dotted names; on the command line every option
is `--section.name VALUE`, with dashes or underscores. `{PROGRAM} config --config FILE.yaml` prints what a
file comes to.
"""


def _reference() -> str:
    """Markdown: one table for each section of the configuration."""
    parts = [_INTRODUCTION]
    for group in RUN_OPTIONS.parser()._action_groups:
        actions = [action for action in group._group_actions if action.dest in RUN_OPTIONS.leaves]
        rows = []
        for action in actions:
            default, text = yaml_text.shortened(action.default), " ".join((action.help or "").split())
            cells = (f"`{action.dest}`", f"`{action.metavar}`", f"`{default}`", text[:1].upper() + text[1:])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if rows:
            section = actions[0].dest.rpartition(".")[0]
            title = f"## `{section}`" if section else "## The run"
            head = "| option | values | default | what it does |\n|---|---|---|---|"
            parts.append("\n".join([title, "", f"{group.title}.", "", head, *rows, ""]))
    return "\n".join(parts)
