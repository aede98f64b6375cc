"""Ours against dense, FSDP2 and DeepSpeed ZeRO with offload, and a static narrow network: time and memory.

Every peer runs in fresh processes of its own, so that its peaks are its own; the peers take turns,
repetition by repetition, so that a change of the machine's speed meets all of them. The step time of ours
is that of whole rounds over their steps, one reference loss per step included. ``vs_ours`` above 1 means
that ours is better: it takes less time, or less memory. A peer that cannot run here has its reason in the
table and no ratios.

The device's peak comes from CUDA's allocator; on a CPU see ``bench.device_memory``. The host's peak is
resident memory above the idle process, from the construction of the network on; on a CPU it holds the
device's part too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from offload_sparse.bench.contenders import BATCH, CLASSES, CONTENDERS, Contender, build_network, image_size
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.device_memory import touched_peak
from offload_sparse.bench.measure import on_ranks, peak_resident, random_batch, reset_peak, timed, warm_up
from offload_sparse.bench.options import PeersConfig
from offload_sparse.channels.subnet import build_on_meta

Figures = dict[str, float]

_STEPS = 3
"""Steps that are timed of every other peer, in each repetition."""

_RATIOS = {"step": "step_seconds", "device": "device_bytes", "host": "host_bytes"}


def run(config: PeersConfig) -> BenchResult:
    """Every peer in turns; ``quick`` takes a narrower network and one repetition. Raises ValueError: there is
    no such network, or not of this width."""
    config = resolve(config)
    build_on_meta(partial(build_network, config))  # refuses a mistake before a process is started
    found: dict[str, list[Figures]] = {name: [] for name in CONTENDERS}
    reasons: dict[str, str] = {}
    for _ in range(1 if config.quick else 3):
        for name in (name for name in CONTENDERS if name not in reasons):
            try:
                ranks = measure(name, config)
                found[name].append({key: max(figures[key] for figures in ranks) for key in ranks[0]})
            except RuntimeError as error:
                reasons[name] = last_line(error)
    return summary(config, found, reasons)


def resolve(config: PeersConfig) -> PeersConfig:
    """``config`` with the sizes that 0 stands for. Raises ValueError: more processes than CUDA devices."""
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and config.processes > devices:
        raise ValueError(f"processes is {config.processes}, but there are {devices} CUDA devices; give fewer")
    width, k = (0.5, 10) if config.quick else (2.0, 50)
    return replace(config, width=config.width or width, k=config.k or k)


def measure(name: str, config: PeersConfig) -> list[Figures]:
    """The figures of one peer on every rank. Raises RuntimeError: it failed; the last line says why."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return on_ranks(config.processes, measure_here, name, config, backend=backend)


def measure_here(name: str, config: PeersConfig) -> Figures:
    """Train a few steps with one peer, in this process and its group. Returns median seconds per step, peaks
    of device and host in bytes, bytes over the bus per step and rank."""
    os.dup2(2, 1)  # what libraries print belongs into the log
    device = _device()
    torch.manual_seed(0)
    warm_up()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    batch = random_batch(BATCH, image_size(config), CLASSES, device, generator)
    idle = reset_peak()
    contender = CONTENDERS[name](config, device, batch)
    units = 2 if contender.unit > 1 else _STEPS
    seconds = [timed(partial(_unit, contender)) / contender.unit for _ in range(units + 1)][1:]
    host = peak_resident() - idle
    return {
        "step_seconds": median(seconds),
        "device_bytes": device_peak(contender, device),
        "host_bytes": host,
        "bus_bytes": contender.bus_bytes(),
    }


def _unit(contender: Contender) -> None:
    for _ in range(contender.unit):
        contender.step()


def device_peak(contender: Contender, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if contender.unit == 1:
        return touched_peak(contender.compute, contender.update, contender.resident, contender.on_host)
    contender.step()  # opens a round; the two that follow train either side and leave the full weights alone

    def both() -> None:
        contender.compute()
        contender.compute()

    return touched_peak(both)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(torch.distributed.get_rank())
    return torch.device("cuda", torch.distributed.get_rank())


def last_line(error: RuntimeError) -> str:
    """What a failed peer said last, on one line."""
    return str(error).strip().splitlines()[-1][:200]


def summary(
    config: PeersConfig, found: Mapping[str, list[Figures]], reasons: Mapping[str, str]
) -> BenchResult:
    """Medians over repetitions, and their ratios to ours."""
    medians = {
        name: {key: median(one[key] for one in figures) for key in figures[0]}
        for name, figures in found.items()
        if figures and name not in reasons
    }
    base = medians.get("ours")
    ratios = {
        f"peers.{name}.{short}_vs_ours": figures[key] / base[key]
        for name, figures in medians.items()
        for short, key in _RATIOS.items()
        if base is not None and name != "ours"
    }
    rows = [[name, *_row(medians.get(name)), reasons.get(name, "")] for name in found]
    raw: dict[str, Any] = {"config": asdict(config), "peers": medians, "repetitions": dict(found)}
    raw["not_run"] = dict(reasons)
    return BenchResult(ratios, raw, _HEADER, rows)


_HEADER = ("peer", "step ms", "device MiB", "host MiB", "bus MiB/step", "not run because")


def _row(figures: Figures | None) -> list[str]:
    if figures is None:
        return ["-"] * 4
    mebibytes = (figures[key] / 2**20 for key in ("device_bytes", "host_bytes", "bus_bytes"))
    return [f"{1000 * figures['step_seconds']:.0f}", *(f"{size:.1f}" for size in mebibytes)]
