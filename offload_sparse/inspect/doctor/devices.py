"""CUDA devices: what torch sees of them, and how fast host memory reaches them.

The probes have not been run on a GPU yet.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from offload_sparse.inspect.doctor.finding import Finding

_PROBE_BYTES = 256 << 20
_REPETITIONS = 5
_SLOW = 6e9
"""Bytes per second from page-locked memory below which a link is not what a GPU usually has."""


def check_devices() -> Iterator[Finding]:
    """Devices, page-locking, and the bus of each device."""
    if not torch.cuda.is_available():
        yield _no_device()
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = f"GPU {index}"
        yield _guarded(name, lambda device=device, name=name: _device(device, name))  # type: ignore[misc]
        yield _guarded(f"{name} bus", lambda device=device, name=name: _bus(device, name))  # type: ignore[misc]


def _no_device() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "ok", "none; subnets compute on the CPU")
    built = torch.version.cuda
    found = f"there is a driver, but torch ({torch.__version__}) sees no device"
    if built is None:
        return Finding("GPU", "error", found, "this torch is built without CUDA: install a CUDA build")
    fix = f"torch needs a driver for CUDA {built}: update it, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
    return Finding("GPU", "error", found, fix)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check whose failure is a finding."""
    try:
        return check()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        fix = "look at nvidia-smi and dmesg; CUDA_LAUNCH_BLOCKING=1 names the call that fails"
        return Finding(name, "error", reason, fix)


def _device(device: torch.device, name: str) -> Finding:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found = f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    result = torch.ones(8, device=device).sum().item()
    assert result == 8, "a sum on the device is right"
    if free < total / 2:
        fix = (
            "end the other programs on it (nvidia-smi lists them), or choose another by CUDA_VISIBLE_DEVICES"
        )
        return Finding(name, "warning", found, fix)
    return Finding(name, "ok", found)


def _bus(device: torch.device, name: str) -> Finding:
    """Page-lock memory as the store does, and time copies to and from the device."""
    from offload_sparse.store.copy.probe import zero_copy_is_faster
    from offload_sparse.store.host_memory import host_zeros

    host = host_zeros(_PROBE_BYTES // 4, torch.float32, "on")
    there = torch.empty_like(host, device=device)
    to_device = _rate(lambda: there.copy_(host, non_blocking=True), device)
    back = _rate(lambda: host.copy_(there, non_blocking=True), device)
    way = "kernels read host memory directly" if zero_copy_is_faster(device) else "copies are staged"
    found = f"{to_device / 1e9:.1f} GB/s to the device, {back / 1e9:.1f} GB/s back; {way}"
    if min(to_device, back) < _SLOW:
        fix = "look at the link width (nvidia-smi -q -d PCIE) and at the NUMA node of the process"
        return Finding(f"{name} bus", "warning", found, fix)
    return Finding(f"{name} bus", "ok", found)


def _rate(copy: Callable[[], object], device: torch.device) -> float:
    """Bytes per second, median of the repetitions."""
    seconds = []
    for _ in range(_REPETITIONS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return _PROBE_BYTES / median(seconds[1:])
