"""Does a run fit a machine, and what would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from offload_sparse.config.run import RunConfig
from offload_sparse.policy.budget import Budget
from offload_sparse.run.plan.dry_run import dry_run, example_inputs, model_on_meta
from offload_sparse.run.plan.live_bytes import LiveBytes
from offload_sparse.run.plan.machine import Machine, process_bytes
from offload_sparse.run.plan.plan import PLANNED, Memory, Planner
from offload_sparse.workloads.data.loader import DeclaredData, declared_data
from offload_sparse.workloads.data.order import check_batch

Progress = Callable[[str], None]

GIB = 2**30
_MARGIN = 0.95
"""Share of the memory that a run may take: predictions are right within 5 %."""


def shortage(memory: Memory, machine: Machine) -> str:
    """What the machine lacks, in words; empty when the run fits."""
    host = machine.local_ranks * memory.host
    for kind, needed, free in (("device", memory.device, machine.device), ("host", host, machine.host)):
        if free is not None and needed > _MARGIN * free:
            return f"{needed / GIB:.2f} GiB of {kind} memory are needed and {free / GIB:.2f} GiB are free"
    return ""


def check(config: RunConfig, data: DeclaredData, machine: Machine) -> None:
    """Refuse a run that does not fit, before anything of it is allocated.

    Networks that would fit even dense are let through without being searched for channels. Raises ValueError:
    it does not fit; names the rho or the tier that would."""
    if config.method != "sparse_offload" or _surely_fits(config, data, machine):
        return
    planner = Planner.of(config, data, machine)
    missing = shortage(planner.memory(machine), machine)
    if missing:
        raise ValueError(f"this run does not fit: {missing}; {advice(planner, machine)}")


def advice(planner: Planner, machine: Machine) -> str:
    """What to change, in one sentence."""
    config = planner.config
    rho = largest_rho(planner, machine)
    if rho is not None and rho < config.policy.rho:
        return f"set policy.rho {rho:g}"
    if config.store.tier == "ram":
        planner = planner.having(store=replace(config.store, tier="file"))
        if not shortage(planner.memory(machine), machine):
            return "set store.tier file"
        rho = largest_rho(planner, machine)
        if rho is not None:
            return f"set store.tier file and policy.rho {rho:g}"
    untaught = planner.having(train=replace(config.train, distill=False))
    if config.train.distill and not shortage(untaught.memory(machine), machine):
        return "set train.distill false"
    return "lower data.batch_size or take a smaller model (or set train.check false to try all the same)"


def largest_rho(planner: Planner, machine: Machine) -> float | None:
    """The largest rho in whole percent, at most 1, at which the run fits; None when none does."""
    groups, cost = planner.structure.channel_map.groups, planner.structure.cost

    def fits(percent: int) -> bool:
        return not shortage(planner.with_rho(percent / 100).memory(machine), machine)

    def is_refused(percent: int) -> bool:
        try:
            Budget.of(planner.with_rho(percent / 100).config.policy, groups, cost)
        except ValueError:
            return True
        return False

    least = (_bisect(is_refused, 1, 99) or 0) + 1
    found = 100 if fits(100) else _bisect(fits, least, 99)
    return None if found is None else found / 100


def largest_batch(planner: Planner, machine: Machine) -> int | None:
    """The largest global batch, at most the configured one, at which the run fits; None when none does."""
    config, ranks = planner.config, machine.ranks

    def fits(per_rank: int) -> bool:
        smaller = planner.having(data=replace(config.data, batch_size=per_rank * ranks))
        return not shortage(smaller.memory(machine), machine)

    # BatchNorm over one image of one pixel is no statistic, so a rank has two.
    found = _bisect(fits, 2, max(2, config.data.batch_size // ranks))
    return None if found is None else found * ranks


def out_of_memory(config: RunConfig, data: DeclaredData, machine: Machine) -> str:
    """What to change after a run has found its device too small, in one sentence; ``machine`` has the device
    memory that the run could have had."""
    if config.method != "sparse_offload":
        return "out of device memory; lower data.batch_size, or train with method sparse_offload"
    planner = Planner.of(config, data, machine)
    rho, batch = largest_rho(planner, machine), largest_batch(planner, machine)
    return (
        f"out of device memory; by the plan policy.rho is at most {rho or '-'} (it is {config.policy.rho:g}) "
        f"or data.batch_size at most {batch or '-'} (it is {config.data.batch_size}): lower one of them"
    )


def figures(config: RunConfig, machine: Machine, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The plan of a run as one JSON object; sizes in bytes. ``beside`` has those of other methods;
    ``progress`` hears what is being worked out. Raises ValueError: the network cannot be built or narrowed,
    the data section leaves something open, the batch does not divide over the ranks, or the method is none
    that is planned."""
    data = declared_data(config.data)
    check_batch(config.data.batch_size, machine.ranks)
    progress(f"looking for the channels of {config.model.name}")
    planner = Planner.of(config, data, machine)
    config = planner.config
    progress("the memory of a step")
    memories = {method: planner.with_method(method).memory(machine) for method in PLANNED}
    memory = memories.get(config.method) or planner.memory(machine)
    missing = shortage(memory, machine)
    run = dry_run(config, planner.structure, data)
    found = {
        "method": config.method,
        "model": config.model.name,
        "parameters": run["dense_parameters"],
        "rho": None if config.method == "dense" else config.policy.rho,
        "ranks": machine.ranks,
        **memory_figures(memory),
        "host_process_bytes": process_bytes(),
        "train_cost_saving": run["train_cost_saving"],
        "available_host_bytes": machine.host // machine.local_ranks,
        "available_device_bytes": machine.device,
        "fits": not missing,
    }
    beside = {
        method: memory_figures(other) | {"fits": not shortage(other, machine)}
        for method, other in memories.items()
    }
    if config.method != "sparse_offload":
        return found | {"beside": beside}
    progress("the largest rho that fits")
    return found | {
        "tier": config.store.tier,
        "bus_bytes_per_round": sum(planner.traffic(machine)),
        "sent_bytes_per_step": planner.sent(machine),
        "advice": missing and f"{missing}; {advice(planner, machine)}",
        "largest_rho": largest_rho(planner, machine),
        "beside": beside,
    }


def memory_figures(memory: Memory) -> dict[str, Any]:
    """What one rank takes, by name."""
    return {
        "host_bytes": memory.host,
        "host_store_bytes": memory.store,
        "host_initialising_bytes": memory.initialising,
        "host_staging_bytes": memory.staging,
        "file_bytes": memory.files,
        "device_bytes": memory.device,
        "device_subnet_bytes": memory.subnets,
        "device_activation_bytes": memory.activations,
        "device_is_host": memory.on_host,
    }


def beside_dense(planner: Planner, machine: Machine) -> str:
    """What the run is expected to take of FLOPs and memory, in words, beside dense training."""
    config = planner.config
    method = config.method if config.method in PLANNED else "dense"
    own, dense = (planner.with_method(m).memory(machine, 1) for m in (method, "dense"))
    run = dry_run(config, planner.structure, planner.data)
    words = [f"FLOPs 1/{run['train_cost_saving']:.2g} of dense"] if method == config.method != "dense" else []
    kinds = ("host",) if machine.device is None else ("device", "host")
    sizes = {kind: [readable(getattr(memory, kind)) for memory in (own, dense)] for kind in kinds}
    return ", ".join([*words, *(f"{kind} {a} (dense {b})" for kind, (a, b) in sizes.items())])


def readable(size: float) -> str:
    """Bytes as GiB, or MiB where that is less than a tenth."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _surely_fits(config: RunConfig, data: DeclaredData, machine: Machine) -> bool:
    """A bound that needs no search for channels: a dozen times the dense weights, and four times what a dense
    step makes of a batch, would fit in a quarter of the memory."""
    model, (image,) = model_on_meta(config, data), example_inputs(config, data, 1)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    with LiveBytes() as made:
        model.eval()(image)
    needed = 12 * weights + 4 * made.peak * config.data.batch_size
    wider = getattr(torch, config.train.dtype).itemsize / torch.float32.itemsize
    host = machine.host / machine.local_ranks
    return needed * wider < min(host, host if machine.device is None else machine.device) / 4


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number in [low, high] that fits, for a condition that holds up to some number."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
