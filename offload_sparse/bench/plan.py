"""Memory that the plan predicts against memory measured, on the host and on the device, for five networks.

What is predicted is what is allocated: the store's arrays and what torch's allocator hands out. Resident
memory also holds what libraries take by themselves (convolution kernels and their workspaces, loaded code);
it is printed beside, because that is what a user sees.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import (
    loss_of,
    on_ranks,
    peak_resident,
    random_batch,
    reset_peak,
    session_of,
)
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.losses import TAIL
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.plan.plan import Planner
from offload_sparse.run.process import return_freed_memory
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.data.loader import declared_data
from offload_sparse.workloads.models import build_model

ROUNDS, STEPS, CLASSES = 2, 2, 10
"""Rounds that are run, and steps in each; classes of the images."""

_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""With these glibc gives memory back as soon as it is freed: what is resident is what is held."""

_HEADER = ("network", "memory", "allocated", "predicted", "ratio", "resident / written by the plan")


def run(quick: bool) -> BenchResult:
    """Each network in fresh processes, one for resident memory and one for what is allocated; ``quick`` takes
    one small network."""
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    rows = []
    for name, config in cases(quick).items():
        predicted = on_ranks(1, predict, config)[0]
        with mock.patch.dict(os.environ, _EXACT_MALLOC):
            resident = on_ranks(1, measure_resident, config)[0]
        found = on_ranks(1, measure_allocated, config)[0]
        raw[name] = {f"predicted_{k}_bytes": v for k, v in predicted.items()}
        raw[name] |= {f"measured_{k}_bytes": v for k, v in (found | {"process": resident}).items()}
        for kind, beside in (("host", f"{resident / predicted['written']:.3f}"), ("device", "")):
            ratio = ratios[f"plan.{name}.{kind}"] = found[kind] / predicted[kind]
            sizes = [f"{size / 2**20:.0f} MiB" for size in (found[kind], predicted[kind])]
            rows.append([name, kind, *sizes, f"{ratio:.3f}", beside])
    return BenchResult(ratios, raw, _HEADER, rows)


def cases(quick: bool) -> dict[str, RunConfig]:
    """Networks of five kinds, at different rho, optimizers and batches."""
    if quick:
        return {"mlp": case("offload_sparse/mlp", 32, 64, 0.25, stream=1024, hidden=8192, depth=2)}
    adamw = OptimConfig("adamw", lr=1e-3)
    return {
        "vgg19": case("offload_sparse/vgg19_cifar", 32, 32, 0.25, width=1.5),
        "resnet20": case("offload_sparse/resnet20_cifar", 32, 32, 0.4, adamw, width=8.0),
        "resnet50": case("torchvision/resnet50", 64, 32, 0.5),
        "mobilenetv1": case("timm/mobilenetv1_100", 64, 64, 0.7, adamw),
        "mlp": case("offload_sparse/mlp", 32, 256, 0.1, stream=1024, hidden=8192, depth=3),
    }


def case(
    name: str, size: int, batch: int, rho: float, optimizer: OptimConfig | None = None, **arguments: Any
) -> RunConfig:
    """A run on random images."""
    return RunConfig(
        model=ModelConfig(name, arguments=arguments),
        data=DataConfig(
            "random",
            batch_size=batch,
            image_size=size,
            declared={"num_classes": CLASSES, "channels": 3, "train_images": 10_000},
        ),
        policy=PolicyConfig.paper(rho=rho),
        round=RoundConfig(k=STEPS, freeze_at=1),
        optim=optimizer or OptimConfig(lr=0.01),
    )


def predict(config: RunConfig) -> dict[str, int]:
    """Bytes of the plan for this machine: host memory that is allocated and that is written, and what is
    allocated where the subnets compute."""
    data = declared_data(config.data)
    machine = Machine(1, 1, 1 << 60, torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None)
    memory = Planner.of(config, data, machine).memory(machine, ROUNDS)
    device_bytes = memory.reserved + memory.activations
    return {"host": memory.host_allocated, "written": memory.host, "device": device_bytes}


def measure_resident(config: RunConfig) -> int:
    """Growth of this process's resident memory, in bytes, above what it took after a tiny run of the same
    network, by which the libraries have what they need whatever the size."""
    train(tiny(config), build_session(tiny(config)))
    return_freed_memory()
    idle = reset_peak()
    train(config, build_session(config))
    return peak_resident() - idle


def measure_allocated(config: RunConfig) -> dict[str, int]:
    """Bytes that torch's allocator hands out while a session trains, on the CUDA device or without one on the
    CPU, there by this thread alone: transfers must not overlap. Returns ``device``: its peak while training
    goes on; ``host``: the store and, beside it, the larger of what its construction allocates and, without a
    CUDA device, of what training does."""
    gc.collect()  # what goes while it is measured would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        session = build_session(config)
    construction = _peak(profiler)
    # The memory of the gradients is there since the session was built.
    gradients = (session.policy.size_cap + TAIL) * session.store.dtype.itemsize
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - gradients
        train(config, session)
        return {
            "device": torch.cuda.max_memory_allocated() - before,
            "host": session.store.nbytes + construction,
        }
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, session)
    peak = gradients + _peak(profiler)
    return {"device": peak, "host": session.store.nbytes + max(construction, peak)}


def _peak(profiler: profile) -> int:
    """Of torch's CPU allocator inside ``profiler``, in bytes."""
    results: Any = profiler.profiler
    memory = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in memory if e.device_type() == DeviceType.CPU]  # a device's are among them
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


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
    """A session of ``ROUNDS`` rounds."""
    data, arguments, policy = config.data, config.model.arguments, config.policy
    factory = partial(build_model, config.model.name, CLASSES, 3, data.image_size, **arguments)
    setup = Setup(residual=config.model.residual, members=max(0, len(policy.budgets) - 1))
    more = {"total_steps": ROUNDS * STEPS, "policy": policy, "setup": setup, "seed": config.train.seed}
    return session_of(
        factory, (3, data.image_size, data.image_size), policy.rho, config.round, config.optim, **more
    )


def train(config: RunConfig, session: SparseOffload) -> None:
    """``ROUNDS`` rounds of ``STEPS`` steps on random images."""
    data, generator = config.data, torch.Generator().manual_seed(0)
    for _ in range(ROUNDS * STEPS):
        batch = random_batch(data.batch_size, data.image_size, CLASSES, session.device, generator)
        session.step(partial(loss_of, batch=batch))
