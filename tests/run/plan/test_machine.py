"""What memory a process may take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_sparse.run.plan.machine import available_memory, parse_bytes, process_bytes, this_machine


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24G", 24 << 30), ("1.5 tb", 3 << 39), ("512 B", 512), ("8kib", 8192)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "x") == size


@pytest.mark.parametrize("text", ["much", "", "GiB", "-1G", "1.2.3G", "24 bits", "80", "8e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"device_memory is .*give a size with its unit, such as (24|80)GiB"):
        parse_bytes(text, "device_memory")


def machine_folders(tmp_path: Path) -> tuple[Path, Path]:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (groups / "a" / "b").mkdir(parents=True)
    return proc, groups


def test_available_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_memory(*machine_folders(tmp_path)) == 8000 * 1024


def test_the_tightest_control_group_decides_and_its_cache_counts_as_free(tmp_path: Path) -> None:
    proc, groups = machine_folders(tmp_path)
    for folder, limit in ((groups / "a" / "b", "max"), (groups / "a", "1000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("600000")
        (folder / "memory.stat").write_text("anon 1\nfile 250000\n")
    assert available_memory(proc, groups) == 650000


def test_this_machine_has_memory_and_this_process_takes_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    machine = this_machine(torch.device("cpu"), 4)
    assert (machine.ranks, machine.local_ranks, machine.device) == (4, 2, None)
    assert machine.host > 1 << 20
    assert process_bytes() > 1 << 20


def test_a_control_group_of_the_first_version_limits(tmp_path: Path) -> None:
    proc, groups = machine_folders(tmp_path)
    (proc / "self" / "cgroup").write_text("4:cpu,cpuacct:/other\n3:memory:/a/b\n0::/\n")
    folder = groups / "memory" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000000\n")
    (folder / "memory.usage_in_bytes").write_text("2500000\n")
    (folder / "memory.stat").write_text("cache 5\ntotal_cache 400000\n")
    assert available_memory(proc, groups) == 900_000


def test_a_limit_on_the_address_space_is_seen() -> None:
    code = "from offload_sparse.run.plan.machine import available_memory; print(available_memory())"
    limited = f"ulimit -v {8 << 20}; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)
    assert 0 < int(done.stdout) < 8 << 30, done.stderr
