"""Memory, limits and folders of the machine."""

from __future__ import annotations

import ctypes.util
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from offload_sparse.inspect.doctor.finding import Finding

_GIB = 2**30
_SMALL_SHM, _SMALL_DISK, _SMALL_MEMORY = 1 * _GIB, 1 * _GIB, 2 * _GIB


def check_system(
    run_dir: Path, has_gpu: bool, dev: Path = Path("/dev"), sys: Path = Path("/sys")
) -> Iterator[Finding]:
    """Memory, memory limits, shared memory, NUMA, huge pages, libaio, folders that are written to."""
    yield _memory()
    yield _locked_memory(has_gpu)
    yield _shared_memory(dev / "shm")
    yield _numa(sys / "devices" / "system" / "node")
    yield _huge_pages(sys / "kernel" / "mm" / "transparent_hugepage" / "enabled")
    yield _libaio()
    for name, folder in (
        ("run folder", run_dir),
        ("cache of data sets", _cache()),
        ("temporary files", _temp()),
    ):
        yield _writable(name, folder)


def _memory() -> Finding:
    from offload_sparse.run.plan.machine import available_memory

    free = available_memory()
    found = f"{free / _GIB:.1f} GiB available"
    if free >= _SMALL_MEMORY:
        return Finding("host memory", "ok", found)
    return Finding("host memory", "warning", found, "end other programs, or set store.tier to file")


def _locked_memory(has_gpu: bool) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory (ulimit -l)", "ok", "unlimited")
    found = f"{limit / 2**20:.1f} MiB"
    if not has_gpu:
        return Finding("locked memory (ulimit -l)", "ok", f"{found}; matters with a GPU only")
    fix = (
        "ulimit -l unlimited, 'memlock' in /etc/security/limits.conf, or --ulimit memlock=-1 for a container"
    )
    return Finding("locked memory (ulimit -l)", "warning", found, fix)


def _shared_memory(path: Path) -> Finding:
    try:
        size = shutil.disk_usage(path).total
    except OSError:
        fix = "mount a tmpfs there, or keep data.num_workers at 0"
        return Finding("shared memory", "warning", f"{path} does not exist", fix)
    found = f"{size / _GIB:.2f} GiB at {path}"
    if size >= _SMALL_SHM:
        return Finding("shared memory", "ok", found)
    fix = "--shm-size=8g for a container, or keep data.num_workers at 0: workers pass batches through it"
    return Finding("shared memory", "warning", found, fix)


def _numa(path: Path) -> Finding:
    nodes = len([node for node in path.glob("node*") if node.name[4:].isdigit()]) if path.is_dir() else 1
    if nodes <= 1:
        return Finding("NUMA nodes", "ok", "1")
    fix = "bind each rank to the node of its GPU, such as numactl --cpunodebind=0 --membind=0 …"
    return Finding("NUMA nodes", "warning", f"{nodes}: transfers between nodes are slower", fix)


def _huge_pages(path: Path) -> Finding:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return Finding("huge pages", "ok", "not told by the system")
    mode = text.partition("[")[2].partition("]")[0]
    if mode != "never":
        return Finding("huge pages", "ok", mode)
    fix = f"echo madvise > {path} (as root): large stores are then mapped in fewer pages"
    return Finding("huge pages", "warning", mode, fix)


def _libaio() -> Finding:
    library = ctypes.util.find_library("aio")
    header = any(Path(folder, "libaio.h").is_file() for folder in ("/usr/include", "/usr/local/include"))
    if library and header:
        return Finding("libaio", "ok", library)
    missing = "its headers are missing" if library else "not installed"
    return Finding("libaio", "warning", missing, "for the store tier nvme: apt-get install libaio-dev")


def _writable(name: str, folder: Path) -> Finding:
    """Whether a file can be made where ``folder`` is, or would be."""
    existing = next((f for f in (folder, *folder.absolute().parents) if f.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        fix = "choose another folder: --run_dir for runs, HF_HOME for data sets, TMPDIR for temporary files"
        return Finding(name, "error", f"{folder} cannot be written ({error.strerror})", fix)
    found = f"{folder}, {free / _GIB:.1f} GiB free"
    if free >= _SMALL_DISK:
        return Finding(name, "ok", found)
    return Finding(name, "warning", found, "free some space, or choose a folder on another disk")


def _cache() -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")).expanduser()


def _temp() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))
