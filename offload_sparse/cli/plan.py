"""``offload-sparse plan``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_sparse.cli.table import show
from offload_sparse.config.parse import PROGRAM, Options
from offload_sparse.config.run import RunConfig


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


_OPTIONS = Options(
    PlanConfig,
    f"{PROGRAM} plan",
    (
        f"{PROGRAM} plan --config configs/quickstart.yaml",
        f"{PROGRAM} plan --config configs/quickstart.yaml --gpus 4 --device_memory 24GiB",
        f"{PROGRAM} plan --config configs/quickstart.yaml --method dense",
    ),
    reads_files=True,
)


def plan(argv: Sequence[str]) -> int:
    """Say what a run would take in memory and over the bus, beside other methods; exit code 1 if it does not
    fit.
    """
    names = {f"--{n.replace('_', '-')}": f"--{n}" for n in ("device_memory", "host_memory")}
    config = _OPTIONS.parse([names.get(n, n) + e + v for n, e, v in (token.partition("=") for token in argv)])
    figures = _plan(config)
    if config.json:
        _write_json(figures, Path(config.json))
    beside = figures.pop("beside")
    show({name: _readable(name, value) for name, value in figures.items()}, json_wanted=False)
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
    from rich.console import Console
    from rich.table import Table

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
    Console().print(table)


def _readable(name: str, value: Any) -> Any:
    """Bytes as GiB, or MiB where that is less than a hundredth."""
    if not name.partition("_per_")[0].endswith("bytes") or value is None:
        return "none" if value is None else value
    return _size(value)


def _size(value: float) -> str:
    return f"{value / 2**30:.3f} GiB" if value >= 2**30 / 100 else f"{value / 2**20:.3f} MiB"


def _write_json(figures: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
