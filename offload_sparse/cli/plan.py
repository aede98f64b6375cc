"""``offload-sparse plan``."""

from __future__ import annotations

import json
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


_OPTIONS = Options(
    PlanConfig,
    f"{PROGRAM} plan",
    (
        f"{PROGRAM} plan --config configs/quickstart.yaml",
        f"{PROGRAM} plan --config configs/quickstart.yaml --gpus 4 --device_memory 24GiB",
    ),
    reads_files=True,
)


def plan(argv: Sequence[str]) -> int:
    """Say what a run would take in memory and over the bus, and whether it fits; exit code 1 if not."""
    names = {f"--{n.replace('_', '-')}": f"--{n}" for n in ("device_memory", "host_memory", "largest_width")}
    config = _OPTIONS.parse([names.get(n, n) + e + v for n, e, v in (token.partition("=") for token in argv)])
    figures = _plan(config)
    if config.json:
        _write_json(figures, Path(config.json))
    show({name: _readable(name, value) for name, value in figures.items()}, json_wanted=False)
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
    return figures(config, machine, config.largest_width)


def _readable(name: str, value: Any) -> Any:
    """Bytes as GiB, or MiB where that is less than a hundredth."""
    if not name.partition("_per_")[0].endswith("bytes") or value is None:
        return "none" if value is None else value
    return f"{value / 2**30:.3f} GiB" if value >= 2**30 / 100 else f"{value / 2**20:.3f} MiB"


def _write_json(figures: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
