"""What a machine has: memory of the host and of the device, for one rank."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Machine:
    """What the ``local_ranks`` of one node share, of ``ranks`` in the run, and what each has.

    Attributes:
        host: bytes of host memory that the node's ranks may take together.
        device: bytes of device memory per rank; None when subnets compute in host memory."""

    ranks: int
    local_ranks: int
    host: int
    device: int | None


def this_machine(device: torch.device, ranks: int) -> Machine:
    """The machine that this process runs on, with what is free now."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Machine(ranks, max(1, min(local, ranks)), available_memory(), free)


def parse_bytes(text: str, name: str) -> int:
    """A size such as ``24GiB``, ``24G`` or ``24 GB`` (all binary). Raises ValueError: it is none, or has no
    unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    if match is None or not (match[2] or match[3]):
        number = text.strip() if match else "24"
        raise ValueError(f"{name} is {text!r}; give a size with its unit, such as {number}GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes can take without swapping: of the machine, of the tightest control group that this
    process is in (of either version), or of its address space (``ulimit -v``). Page cache counts as free."""
    limits = [_meminfo(proc), *_group_rooms(proc, cgroup)]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        limits.append(max(0, space - _address_space(proc)))
    return min(limits)


def process_bytes(pid: int | str = "self") -> int:
    """Resident memory that is a process's own (no file stands behind it): the interpreter, its libraries'
    data, and what it has allocated so far. 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _meminfo(proc: Path) -> int:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _address_space(proc: Path) -> int:
    try:
        return int((proc / "self" / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _group_rooms(proc: Path, cgroup: Path) -> Iterator[int]:
    """Room left in each control group from this process's up to the root, its cache given up."""
    try:
        groups = (proc / "self" / "cgroup").read_text()
    except OSError:
        return
    second = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    first = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$", groups, re.MULTILINE)
    of_version = (
        (cgroup, second, "memory.max", "memory.current", "file"),
        (cgroup / "memory", first, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    )
    for root, match, limit_file, used_file, cache in of_version:
        here = root / match[1] if match else root
        for folder in (here, *here.parents):
            try:
                limit = int((folder / limit_file).read_text())
                used = int((folder / used_file).read_text())
                stat = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # no such file, or "max"
                continue
            yield max(0, limit - used + (int(stat[1]) if stat else 0))
