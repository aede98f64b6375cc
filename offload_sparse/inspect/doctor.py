"""What a machine lacks for a run, and what to do about it.

Versions of torch and of the machine, and accelerate's file of defaults, are what ``accelerate env`` prints;
here is what a run of this package needs beyond them.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import logging
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement

_GIB = 2**30
_SMALL_SHM = _SMALL_DISK = _GIB
_PROBE_BYTES = 256 << 20
_REPETITIONS = 5
_SLOW = 6e9
"""Bytes per second from page-locked memory below which a link is not what a GPU usually has."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: an ``error`` if a run cannot work, a ``warning`` if it is slower or can do
    less; ``found`` says what is there, ``fix`` what to do about it (empty for ``ok``)."""

    name: str
    state: Literal["ok", "warning", "error"]
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.state != "ok"), f"{self.name}: a fix belongs to what is not ok"


def examine(run_dir: Path) -> list[Finding]:
    """Every finding about this machine, and about ``run_dir`` where runs would be written, in the order in
    which they are printed."""
    logger = logging.getLogger("offload_sparse")
    level = logger.level
    logger.setLevel(logging.ERROR)  # findings say what warnings would
    try:
        machine = (*check_devices(), *check_system(run_dir))
        return [*check_packages(), check_kernels(), *machine, *check_launch()]
    finally:
        logger.setLevel(level)


def _judged(name: str, found: str, fix: str = "") -> Finding:
    """A warning if there is something to fix."""
    return Finding(name, "warning" if fix else "ok", found, fix)


def check_packages() -> Iterator[Finding]:
    """Every requirement of the package, against what is installed."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("offload-sparse") or []]
    except importlib.metadata.PackageNotFoundError:
        found = "the package runs from its folder and is not installed"
        yield _judged("packages", found, "pip install -e . (in the folder of the repository)")
        return
    needed = [_required(r) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [finding for finding in needed if finding.state != "ok"]
    yield from wrong or [Finding("packages", "ok", f"all {len(needed)} that are needed")]


def _required(requirement: Requirement) -> Finding:
    fix = f"pip install '{requirement}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "error", "not installed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    return Finding(requirement.name, "error", f"{version}, but {requirement.specifier} is needed", fix)


def check_kernels() -> Finding:
    """Move a small slice by the native kernel and compare it with torch's indexing."""
    from offload_sparse.store.copy.blocks import part_of_matrix
    from offload_sparse.store.copy.copy import copy_blocks
    from offload_sparse.store.copy.host_copy import load

    if load() is None:
        fix = "reinstall numba, or set NUMBA_CACHE_DIR to a folder that can be written"
        return _judged("native kernels", "numba cannot compile them: transfers are slower", fix)
    rows, columns = np.arange(0, 64, 2), np.arange(0, 64, 3)
    source = torch.randn(64 * 64)
    out = torch.empty(len(rows) * len(columns))
    copy_blocks(part_of_matrix((64, 64, 1), rows, columns), [(source, out)])
    if torch.equal(out.view(len(rows), -1), source.view(64, 64)[rows][:, columns]):
        return Finding("native kernels", "ok", "compiled, and a slice arrives whole")
    return Finding("native kernels", "error", "a slice arrives changed", "set NUMBA_CPU_NAME=generic")


def check_devices() -> Iterator[Finding]:
    """Devices, page-locking, and the bus of each device."""
    if not torch.cuda.is_available():
        yield _no_device()
        return
    for index in range(torch.cuda.device_count()):
        device, name = torch.device("cuda", index), f"GPU {index}"
        yield _guarded(name, partial(_device, device, name))
        yield _guarded(f"{name} bus", partial(_bus, device, f"{name} bus"))


def _no_device() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "ok", "none; subnets compute on the CPU")
    found = f"there is a driver, but torch ({torch.__version__}) sees no device"
    if torch.version.cuda is None:
        return Finding("GPU", "error", found, "this torch is built without CUDA: install a CUDA build")
    fix = "update it, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
    return Finding("GPU", "error", found, f"torch needs a driver for CUDA {torch.version.cuda}: {fix}")


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check whose failure is a finding."""
    try:
        return check()
    except (RuntimeError, ValueError) as error:
        fix = "look at nvidia-smi and dmesg; CUDA_LAUNCH_BLOCKING=1 names the call that fails"
        return Finding(name, "error", " ".join(str(error).split())[:200], fix)


def _device(device: torch.device, name: str) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    assert torch.ones(8, device=device).sum().item() == 8, "a sum on the device is right"
    found = f"{torch.cuda.get_device_name(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    fix = "end the other programs on it (nvidia-smi lists them), or choose another by CUDA_VISIBLE_DEVICES"
    return _judged(name, found, fix if free < total / 2 else "")


def _bus(device: torch.device, name: str) -> Finding:
    """Page-lock memory as the store does, and time copies to and from the device."""
    from offload_sparse.store.copy.device_copy import WIDE, zero_copy_is_faster
    from offload_sparse.store.host_memory import host_zeros

    host = host_zeros(_PROBE_BYTES // 4, torch.float32, "on")
    there = torch.empty_like(host, device=device)
    to_device = _rate(lambda: there.copy_(host, non_blocking=True), device)
    back = _rate(lambda: host.copy_(there, non_blocking=True), device)
    direct = zero_copy_is_faster(device, False, WIDE)
    way = "kernels read host memory directly" if direct else "copies are staged"
    found = f"{to_device / 1e9:.1f} GB/s to the device, {back / 1e9:.1f} GB/s back; {way}"
    fix = "look at the link width (nvidia-smi -q -d PCIE) and at the NUMA node of the process"
    return _judged(name, found, fix if min(to_device, back) < _SLOW else "")


def _rate(copy: Callable[[], object], device: torch.device) -> float:
    """Bytes per second, the best of the repetitions."""
    best = math.inf
    for _ in range(_REPETITIONS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best


def check_system(run_dir: Path) -> Iterator[Finding]:
    """Memory, memory limits, shared memory, NUMA, libaio, folders that are written to."""
    from offload_sparse.run.plan.machine import available_memory

    free = available_memory()
    fix = "end other programs, or set store.tier to file" if free < 2 * _GIB else ""
    yield _judged("host memory", f"{free / _GIB:.1f} GiB available", fix)
    yield _locked_memory(torch.cuda.is_available())
    yield _shared_memory(shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0)
    yield _numa(Path("/sys/devices/system/node"))
    yield _libaio()
    yield _writable("run folder", run_dir)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    yield _writable("cache of data sets", Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")))
    yield _writable("temporary files", Path(os.environ.get("TMPDIR", "/tmp")))


def _locked_memory(has_gpu: bool) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.1f} MiB"
    fix = "ulimit -l unlimited, limits.conf (memlock), or --ulimit memlock=-1 for a container"
    return _judged("locked memory", found, fix if has_gpu and found != "unlimited" else "")


def _shared_memory(size: int) -> Finding:
    fix = "--shm-size=8g for a container, or keep data.num_workers at 0: workers pass batches through it"
    return _judged("shared memory", f"{size / _GIB:.2f} GiB", fix if size < _SMALL_SHM else "")


def _numa(path: Path) -> Finding:
    nodes = max(1, sum(node.name[4:].isdigit() for node in path.glob("node*")))
    fix = "transfers between nodes are slower: numactl --cpunodebind=0 --membind=0 … for each rank"
    return _judged("NUMA nodes", str(nodes), fix if nodes > 1 else "")


def _libaio() -> Finding:
    """What DeepNVMe is built with, which is a matter of DeepSpeed."""
    found = ctypes.util.find_library("aio")
    wanted = found is None and importlib.util.find_spec("deepspeed") is not None
    fix = "install the package libaio-dev" if wanted else ""
    return _judged("libaio", found or "none; store.tier nvme works as file", fix)


def _writable(name: str, folder: Path) -> Finding:
    """Whether a file can be made where ``folder`` is, or would be."""
    folder = folder.expanduser()
    existing = next((f for f in (folder, *folder.absolute().parents) if f.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        fix = "choose another folder: --run_dir for runs, HF_HOME for data sets, TMPDIR for temporary files"
        return Finding(name, "error", f"{folder} cannot be written ({error.strerror})", fix)
    fix = "free some space, or choose a folder on another disk"
    return _judged(name, f"{folder}, {free / _GIB:.1f} GiB free", fix if free < _SMALL_DISK else "")


def check_launch(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether the processes of a run would find each other, and share the cores."""
    yield _processes(env)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks, threads = int(env.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    fix = f"export OMP_NUM_THREADS={max(1, cores // ranks)}" if threads * ranks > cores else ""
    yield _judged("threads", f"{threads} per process, {ranks} processes, {cores} cores", fix)


def _processes(env: Mapping[str, str]) -> Finding:
    from offload_sparse.run.launch import TWO_CPU_RANKS, check_environment

    try:
        check_environment(env)
    except ValueError as error:
        found, _, fix = str(error).partition("; ")
        return Finding("launch", "error", found, fix or TWO_CPU_RANKS)
    world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Finding("launch", "ok", "one process")
    from accelerate import PartialState

    seen = PartialState(cpu=not torch.cuda.is_available()).num_processes
    found = f"{world_size} processes by the launcher, {seen} by accelerate"
    fix = "" if seen == world_size else f"on CPU start two ranks with: {TWO_CPU_RANKS}"
    return Finding("launch", "error" if fix else "ok", found, fix)
