"""What benches measure with: seconds of passes in turns, resident memory, functions on fresh processes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.channels.discovery import discover
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.process import bound_memory
from offload_sparse.store.copy import host_copy
from offload_sparse.workloads.models import build_model

Batch = tuple[Tensor, Tensor]

NETWORKS: dict[str, tuple[str, int, int, int]] = {
    "vgg19": ("offload_sparse/vgg19_cifar", 32, 32, 10),
    "resnet20": ("offload_sparse/resnet20_cifar", 32, 64, 10),
    "resnet50": ("torchvision/resnet50", 224, 4, 1000),
    "mobilenetv1": ("timm/mobilenetv1_100", 224, 4, 1000),
}
"""Name, image side, batch size, classes."""


def network_of(name: str) -> nn.Module:
    """A network of ``NETWORKS``."""
    model, size, _, classes = NETWORKS[name]
    return build_model(model, classes, 3, size)


def batch_of(name: str, device: torch.device) -> Batch:
    """Random images and labels for a network of ``NETWORKS``."""
    _, size, batch, classes = NETWORKS[name]
    return random_batch(batch, size, classes, device)


def random_batch(
    count: int, size: int, classes: int, device: torch.device, generator: torch.Generator | None = None
) -> Batch:
    """Images float32[count, 3, size, size] and labels int64[count]."""
    images = torch.randn(count, 3, size, size, generator=generator)
    return images.to(device), torch.randint(classes, (count,), generator=generator).to(device)


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the device's work included."""
    _wait()
    start = clock()
    function()
    _wait()
    return clock() - start


def take_turns(
    passes: Mapping[str, Callable[[], object]],
    repetitions: int,
    between: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every pass by ``clock``, by name, in turns, after one of each that does not count: a change
    of the machine's speed then meets all of them. ``between`` is called before each pass, not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repetition in range(repetitions + 1):
        for name, run_once in passes.items():
            if between is not None:
                between()
            taken = timed(run_once, clock)
            if repetition:
                seconds[name].append(taken)
    return seconds


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of neighbours: of the same turn, or of the same seed."""
    return median(a / b for a, b in zip(ours, others, strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on the thread that calls it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def session_of(
    factory: Callable[[], nn.Module],
    shape: Sequence[int],
    rho: float,
    rounds: RoundConfig,
    optim: OptimConfig | None = None,
    **more: Any,
) -> SparseOffload:
    """A session on images of ``shape`` (channels, height, width), in a process whose memory is bounded as a
    run's is: with the masks of the paper, not verified, and without an end, unless ``more`` says otherwise.
    """
    bound_memory(factory)
    usual: dict[str, Any] = {"total_steps": 1 << 30, "setup": Setup(verify=False)}
    usual["policy"] = PolicyConfig.paper(rho=rho)
    example, optimizer = torch.empty(1, *shape, device="meta"), optimizer_factory(optim or OptimConfig())
    return SparseOffload(factory, (example,), optimizer, rounds=rounds, **(usual | more))


# --- memory ---


def warm_up() -> None:
    """Load what a training process needs however small its model is, so that it counts as idle."""
    host_copy.load()
    small = build_model("offload_sparse/vgg_small", 10, 3, 8, width=0.25)
    discover(small, (torch.randn(1, 3, 8, 8),))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, fused=True)
    small(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()


def reset_peak() -> int:
    """Make the kernel forget this process's peak (Linux). Returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    """Largest resident memory of this process since ``reset_peak``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


# --- processes ---


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, backend: str = "") -> list[Any]:
    """What ``function(*args)`` returns on every rank of a fresh process group (gloo, and none for a single
    rank, unless ``backend`` says otherwise), one thread each; it is importable by name, since the processes
    are spawned. Raises RuntimeError: a rank failed; the last line says why."""
    backend = backend or ("gloo" if world_size > 1 else "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_rank, (world_size, folder, backend, function, args), nprocs=world_size)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RuntimeError(str(error)) from error
        return [torch.load(Path(folder) / f"result{r}", weights_only=False) for r in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    backend: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if backend:
        store = dist.FileStore(str(Path(folder) / "rendezvous"), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    torch.save(function(*args), Path(folder) / f"result{rank}")
    if backend:
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()
    os._exit(0)  # the result is on disk; the interpreter's teardown would race with the threads of the group
