"""What a machine has: memory of the host and of the device, for one rank."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Machine:
    """What the ranks of one node share, and what each has.

    Attributes:
        ranks: ranks of the run.
        local_ranks: ranks on this node.
        host: bytes of host memory that the node's ranks may take together.
        device: bytes of device memory per rank; None when subnets compute in host memory.
    """

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
    """A size such as ``24GiB``, ``24G``, ``24 GB`` (all binary) or a number of bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{name} is {text!r}; give a size such as 24GiB") from error


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes can take without swapping: of the machine, or of the tightest control group that
    this process is in. Page cache counts as available.
    """
    limits = [_meminfo(proc), *_group_rooms(proc, cgroup)]
    return min(limit for limit in limits if limit is not None)


def process_bytes() -> int:
    """Resident memory of this process that is its own: the interpreter, its libraries' data, and what it has
    allocated so far. 0 where the system does not tell.
    """
    return anonymous_bytes(os.getpid())


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file stands behind. 0 where the system does not tell."""
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


def _group_rooms(proc: Path, cgroup: Path) -> Iterator[int]:
    """Room left in each control group (version 2) from this process's up to the root, its cache given up."""
    try:
        match = re.search(r"^0::(/.*)$", (proc / "self" / "cgroup").read_text(), re.MULTILINE)
    except OSError:
        return
    here = cgroup / match[1].lstrip("/") if match else cgroup
    for folder in (here, *here.parents):
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            stat = re.search(r"^file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        yield max(0, limit - used + (int(stat[1]) if stat else 0))
