"""Memory that the plan predicts against memory measured, on the host and on the device, for five networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.memory import loss_fn, peak_resident, reset_peak, resident
from offload_sparse.bench.ranks import run_ranks
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.subnet_pair import TAIL
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.plan.dry_run import structure_of
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.plan.plan import Planner
from offload_sparse.store.host_memory import return_freed_memory
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.data.loader import declared_data
from offload_sparse.workloads.models import build_model, input_channels

ROUNDS, STEPS = 2, 2
"""Rounds that are run, and steps in each."""


def run(quick: bool) -> BenchResult:
    """Each network in fresh processes: one for resident memory, one for what is allocated (the store's arrays
    and torch's allocator), which is what the plan predicts.

    ``quick`` takes one small network.
    """
    cases = {"mlp": quick_case()} if quick else full_cases()
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    rows = []
    for name, config in cases.items():
        predicted = run_ranks(1, predict, config, limit=600.0)[0]
        with exact_malloc():
            found = run_ranks(1, measure_host, config, limit=900.0)[0]
        found |= run_ranks(1, measure_device, config, limit=900.0)[0]
        raw[name] = {f"predicted_{k}_bytes": v for k, v in predicted.items()}
        raw[name] |= {f"measured_{k}_bytes": v for k, v in found.items()}
        for kind in ("host", "device"):
            ratios[f"plan.{name}.{kind}"] = found[kind] / predicted[kind]
            sizes = [f"{size / 2**20:.0f} MiB" for size in (found[kind], predicted[kind])]
            rows.append([name, kind, *sizes, f"{found[kind] / predicted[kind]:.3f}", ""])
        # Resident memory also holds what libraries take by themselves (convolution kernels and their
        # workspaces, loaded code): printed beside, because that is what a user sees.
        rows[-2][-1] = f"{found['process'] / predicted['written']:.3f}"
    header = ["network", "memory", "allocated", "predicted", "ratio", "resident / written by the plan"]
    return BenchResult(ratios, raw, header, rows)


def full_cases() -> dict[str, RunConfig]:
    """Networks of five kinds, at different rho, optimizers and batches."""
    adamw = OptimConfig("adamw", lr=1e-3)
    return {
        "vgg19": case("offload_sparse/vgg19_cifar", 32, 32, 0.25, width=1.5),
        "resnet20": case("offload_sparse/resnet20_cifar", 32, 32, 0.4, adamw, width=8.0),
        "resnet50": case("torchvision/resnet50", 64, 32, 0.5),
        "mobilenetv1": case("timm/mobilenetv1_100", 64, 64, 0.7, adamw),
        "mlp": case("offload_sparse/mlp", 32, 256, 0.1, stream=1024, hidden=8192, depth=3),
    }


def quick_case() -> RunConfig:
    return case("offload_sparse/mlp", 32, 64, 0.25, stream=1024, hidden=8192, depth=2)


def case(
    name: str, size: int, batch: int, rho: float, optimizer: OptimConfig | None = None, **arguments: Any
) -> RunConfig:
    """A run on random images of ten classes."""
    data = DataConfig(
        "random", batch_size=batch, image_size=size, num_classes=10, channels=3, train_images=10_000
    )
    return RunConfig(
        model=ModelConfig(name, arguments=arguments),
        data=data,
        policy=PolicyConfig.paper(rho=rho),
        round=RoundConfig(k=STEPS, freeze_at=1),
        optim=optimizer or OptimConfig(lr=0.01),
    )


def predict(config: RunConfig) -> dict[str, int]:
    """Bytes of the plan for this machine: host memory that is allocated and that is written, and what is
    allocated where the subnets compute.
    """
    data = declared_data(config.data)
    planner = Planner(config, data, structure_of(config, data))
    device = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    memory = planner.memory(Machine(1, 1, 1 << 60, device), ROUNDS)
    device_bytes = memory.reserved + memory.activations
    return {"host": memory.host_allocated, "written": memory.host, "device": device_bytes}


def measure_host(config: RunConfig) -> dict[str, int]:
    """Growth of this process's resident memory, in bytes, above what it took after a tiny run of the same
    network, by which the libraries have what they need whatever the size.

    Returns:
        ``construction``: its peak from building the model to the filled store; ``between_steps``: the largest
        at the end of a step; ``process``: its peak through all of it.
    """
    train(build_session(tiny(config)), tiny(config))
    return_freed_memory()
    reset_peak()
    idle = peak_resident()
    session = build_session(config)
    construction = peak_resident()
    between = 0

    def note() -> None:
        nonlocal between
        between = max(between, resident())

    train(session, config, note)
    found = {"construction": construction, "between_steps": between, "process": peak_resident()}
    return {name: size - idle for name, size in found.items()}


def measure_device(config: RunConfig) -> dict[str, int]:
    """What torch's allocator hands out while a session trains, in bytes: on the CUDA device or, without one,
    on the CPU.

    Returns:
        ``device``: its peak while the session trains; ``host``: the store and, beside it, the larger of what
        its construction allocates and, without a CUDA device, of what training does.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        session = build_session(config)
    construction = _allocations(profiler)[0]
    peak = device_peak(session, config)
    training = 0 if session.device.type == "cuda" else peak
    return {"device": peak, "host": session.store.nbytes + max(construction, training)}


def device_peak(session: SparseOffload, config: RunConfig) -> int:
    """Peak of torch's allocator while a session trains, in bytes, with the memory of the gradients, which is
    there since the session was built.
    """
    gradients = (session.policy.size_cap + TAIL) * session.store.dtype.itemsize
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - gradients
        train(session, config)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(session, config)
    return gradients + _allocations(profiler)[0]


def _allocations(profiler: profile) -> tuple[int, int]:
    """(peak, level at the end) of torch's CPU allocator inside ``profiler``, in bytes."""
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


@contextmanager
def exact_malloc() -> Iterator[None]:
    """Processes started inside give memory back as soon as it is freed, instead of keeping it for later: what
    is resident is what is held (glibc).
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    kept = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def tiny(config: RunConfig) -> RunConfig:
    """The same kind of run on the narrowest network of its kind."""
    arguments: dict[str, Any] = dict(config.model.arguments)
    if "width" in arguments:
        arguments["width"] = 0.25
    if "hidden" in arguments:
        arguments |= {"stream": 64, "hidden": 64}
    data = replace(config.data, batch_size=4)
    return replace(config, model=replace(config.model, arguments=arguments), data=data)


def build_session(config: RunConfig) -> SparseOffload:
    data, arguments = config.data, config.model.arguments
    channels = input_channels(config.model.name, data.channels)

    def factory() -> torch.nn.Module:
        return build_model(config.model.name, data.num_classes, channels, data.image_size, **arguments)

    return SparseOffload(
        factory,
        (torch.empty(1, channels, data.image_size, data.image_size, device="meta"),),
        total_steps=ROUNDS * STEPS,
        policy=config.policy,
        rounds=config.round,
        optimizer=config.optim,
        final=config.final,
        residual=config.model.residual,
        seed=config.train.seed,
    )


def train(session: SparseOffload, config: RunConfig, after_step: Callable[[], None] = lambda: None) -> None:
    """``ROUNDS`` rounds of ``STEPS`` steps on random images."""
    data, generator = config.data, torch.Generator().manual_seed(0)
    channels = input_channels(config.model.name, data.channels)
    for _ in range(ROUNDS * STEPS):
        images = torch.randn(data.batch_size, channels, data.image_size, data.image_size, generator=generator)
        labels = torch.randint(data.num_classes, (data.batch_size,), generator=generator)
        session.step((images.to(session.device), labels.to(session.device)), loss_fn)
        after_step()
