"""What to run first on a new card: what works, how fast and beside what, in one table; ten minutes.

Nothing stops at a failure: its row says what failed, and the next part goes on. Without a GPU the same rows
are measured on the CPU, and those that only a card can fill are empty. ``compute-sanitizer``, where it is
installed, watches the copy kernel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.bench import input as loaders
from offload_sparse.bench import measure, plan, round, step
from offload_sparse.bench.contract import BenchResult, hardware
from offload_sparse.config.run import MethodName, RunConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.forward import Forward, Metrics
from offload_sparse.engine.session import Setup
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.method import Task
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.copy.device_copy import NARROW, PROBED, WIDE, compared_ways, triton_works
from offload_sparse.store.host_memory import forget_cuda_error, host_zeros
from offload_sparse.workloads.models import build_model

Row = tuple[str, float | None, str]
"""A key below ``gpu.``, its figure (None: only a card has one), and what it is."""

_SMALL = "offload_sparse/vgg_small"
_LOCKED = 1 << 30
_K, _ROUNDS = 4, 3
_WATCHED = (
    "import torch; from offload_sparse.store.copy.device_copy import triton_works as works; "
    "raise SystemExit(not works(torch.device('cuda')))"
)


def run(quick: bool) -> BenchResult:
    """ResNet-50 and VGG-19; ``quick`` takes ResNet-20, fewer images and fewer repetitions."""
    device = measure.default_device()
    result = BenchResult({}, {}, ("part", "figure", "what it is"), [])
    for part in PARTS:
        try:
            for key, figure, what in part(device, quick):
                result.table.append([key, "" if figure is None else figure, what])
                if figure is not None:
                    result.ratios[f"gpu.{key}"] = figure
        except Exception as error:  # of a card, its driver, Triton's compiler, or an assertion of ours
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            result.table.append([part.__name__, "failed", reason])
            result.raw[f"{part.__name__}.failed"] = reason
    return result


def page_locking(device: torch.device, _quick: bool) -> Iterator[Row]:
    """Registration of host memory, and whether a kernel runs after a refusal."""
    rate, survived = None, None
    if device.type == "cuda":
        start = time.perf_counter()
        host = host_zeros(_LOCKED // 4, torch.float32, "on")
        rate = _LOCKED / (time.perf_counter() - start) / 1e9
        refused = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), _LOCKED, 0))  # a second time
        forget_cuda_error()
        survived = float(refused != 0 and torch.ones(8, device=device).sum().item() == 8)
    yield "page_locking.gb_per_s", rate, "host memory mapped, written and registered"
    yield "page_locking.refusal_survived", survived, "1: a kernel runs after a refused registration"


def copies(device: torch.device, _quick: bool) -> Iterator[Row]:
    """Rates of the two ways over the bus, both ways, for single entries and 3x3 windows."""
    here = device.type == "cuda"
    yield "copies.triton_works", float(triton_works(device)) if here else None, "1: the kernel copies right"
    for unit in (NARROW, WIDE):
        for to_host, way in ((False, "to_device"), (True, "to_host")):
            direct, staged = compared_ways(device, to_host, unit) if here else (None, None)
            size = (PROBED // 2) ** 2 * unit * 4
            for name, seconds in (("zero_copy", direct), ("staged", staged)):
                rate = None if seconds is None else size / seconds / 1e9
                what = f"half the rows and units, {unit} entries each"
                yield f"copies.{way}.unit{unit}.{name}_gb_per_s", rate, what
    sanitizer = shutil.which("compute-sanitizer") if here else None
    clean = None
    if sanitizer:
        command = [sanitizer, "--error-exitcode", "9", sys.executable, "-c", _WATCHED]
        clean = float(subprocess.run(command, capture_output=True, check=False).returncode == 0)
    yield "copies.sanitizer_clean", clean, "1: compute-sanitizer finds nothing in the copy kernel"


def engine(device: torch.device, _quick: bool) -> Iterator[Row]:
    """A session with overlapping transfers on the device against one without on the CPU, in float64."""
    ours, cpu = _trained(device, "overlap"), _trained(torch.device("cpu"), "full")
    for name, value in cpu.items():
        scale = float(value.abs().max()) or 1.0
        difference = float((ours[name] - value).abs().max()) / scale
        yield f"engine.{name}_difference", difference, "from the CPU's, of the largest value"


def _trained(device: torch.device, transfer: Literal["full", "overlap"]) -> dict[str, Tensor]:
    """The store and s after a few rounds."""
    factory, rounds = partial(build_model, _SMALL, 10, 3, 16, width=0.5), RoundConfig(k=_K, transfer=transfer)
    # Of single channels, as on the CPU: what ``auto`` makes of atoms depends on the device.
    setup, optim = Setup(dtype=torch.float64, verify=False, block=1), OptimConfig(lr=0.01)
    session = measure.session_of(factory, (3, 16, 16), 0.5, rounds, optim, setup=setup, device=device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_K * _ROUNDS):
        images, labels = measure.random_batch(8, 16, 10, device, generator)
        session.step(partial(_loss, batch=(images.double(), labels)))
    session.settle()
    session.transfers.close()
    return {"store": torch.cat(list(session.store.arrays.values())), "s": session.policy.s}


def _loss(module: nn.Module, batch: measure.Batch) -> tuple[Tensor, Metrics]:
    return F.cross_entropy(module(batch[0]), batch[1]), {}


def methods(device: torch.device, quick: bool) -> Iterator[Row]:
    """A few steps of every method on a small network."""
    factory, example = partial(build_model, _SMALL, 10, 3, 16), (torch.empty(1, 3, 16, 16, device="meta"),)
    batch = measure.random_batch(8, 16, 10, device)
    for name in get_args(MethodName):
        config = RunConfig(method=name, policy=PolicyConfig(rho=0.5), round=RoundConfig(k=_K))
        total = _K * (1 if quick else _ROUNDS)
        method = build_method(Task(config, factory, example, _loss, total, device, torch.float32, Forward()))
        for _ in range(total):
            method.train_step(batch, 0.01)
        losses = torch.tensor([record.loss for record in method.records()])
        yield f"methods.{name}.finite", float(losses.isfinite().all()), f"1: {total} steps with finite losses"


def rounds(device: torch.device, quick: bool) -> Iterator[Row]:
    """``bench round``, with single channels, blocks of 8, and bfloat16 in blocks of 16 or fewer."""
    repetitions = 1 if quick else 3
    setups = {
        "": Setup(verify=False, block=1),
        ".block8": Setup(verify=False, block=8),
        ".bf16_block16": Setup(verify=False, dtype=torch.bfloat16, block="<=16"),
    }
    for network in ("resnet20",) if quick else ("vgg19", "resnet50"):
        factory, batch = partial(measure.network_of, network), measure.batch_of(network, device)
        for suffix, setup in setups.items():
            ours, narrow = round.measure(factory, batch, 10, repetitions, device, setup)
            key, ratio = f"round.{network}.k10{suffix}", measure.median_ratio(ours, narrow)
            yield f"{key}.ms", 1000 * median(ours), "a round of 10 steps"
            yield f"{key}.vs_narrow", ratio, "over 10 steps of a narrow pair by hand"


def steps(device: torch.device, quick: bool) -> Iterator[Row]:
    """``bench step`` at rho = 0.25."""
    for network in ("resnet20",) if quick else ("vgg19", "resnet50"):
        figures = step.measure_network(network, (0.25,), 3 if quick else 7, device)[0.25]
        key, size = f"step.{network}.rho0.25", measure.NETWORKS[network][2]
        yield f"{key}.vs_dense", figures["subnet"] / figures["dense"], "forward and backward, over dense"
        yield f"{key}.vs_narrow", figures["vs_narrow"], "over a narrow network's by hand"
        yield f"{key}.images_per_s", size / figures["subnet"], "that a step of forward and backward takes"


def memory(_device: torch.device, quick: bool) -> Iterator[Row]:
    """``bench plan``: what is allocated on the device over what is planned."""
    for name, config in plan.cases(quick).items():
        if quick or name in ("vgg19", "resnet50"):
            share = plan.measure_allocated(config)["device"] / plan.predict(config)["device"]
            yield f"plan.{name}.device", share, "allocated over planned"


def images(device: torch.device, quick: bool) -> Iterator[Row]:
    """``bench input``, for all cores that this process may use."""
    cores = hardware()["cores"]
    rates, _ = loaders.measure(*((64, 1) if quick else (512, 6)))
    on_cpu = "" if device.type == "cuda" else ", all on the CPU"
    for key, name in (("loader", f"ours{on_cpu}"), ("cached", f"cached{on_cpu}")):
        what = f"JPEGs of 500 x 375 ready for a device, {cores} cores"
        yield f"input.{key}.images_per_s", cores * rates[name], what


PARTS: tuple[Callable[[torch.device, bool], Iterator[Row]], ...] = (
    *(page_locking, copies, engine, methods),
    *(rounds, steps, memory, images),
)
"""In the order in which a new card should be looked at."""
