"""What every bench returns, how its figures are printed and kept, and which benches there are.

A bench is a module ``offload_sparse.bench.<name>`` with a function ``run(quick: bool) -> BenchResult``. The
first line of the module's docstring is what ``offload-sparse bench`` lists. A bench with options of its own
(see ``bench.options``) is called with these, ``run(config)``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from offload_sparse.run.terminal import console

_PACKAGES = ("offload-sparse", "torch", "torchvision", "accelerate", "timm", "numpy")


@dataclass
class BenchResult:
    """The figures of one bench.

    Attributes:
        ratios: the figures that the README quotes and that carry over to other machines, by name.
        raw: everything measured, as JSON can hold it, with units in the keys (``seconds``, ``bytes``).
        header: titles of the columns of ``table``.
        table: the rows that are printed."""

    ratios: dict[str, float]
    raw: Any
    header: Sequence[str] = ()
    table: list[Any] = field(default_factory=list)


def available() -> dict[str, str]:
    """The benches and their first docstring lines, found without importing them."""
    package = Path(__file__).parent
    benches = {}
    for module in pkgutil.iter_modules([str(package)]):
        source = ast.parse((package / f"{module.name}.py").read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in source.body):
            benches[module.name] = (ast.get_docstring(source) or "").split("\n")[0]
    return benches


def load(name: str) -> Callable[..., BenchResult]:
    """The ``run`` function of a bench. Raises ValueError: there is no bench of this name."""
    known = available()
    if name not in known:
        raise ValueError(f"there is no bench {name!r}; give one of: {', '.join(known)}")
    run: Callable[..., BenchResult] = importlib.import_module(f"offload_sparse.bench.{name}").run
    return run


def write(result: BenchResult, command: str, path: Path) -> None:
    """Write the record of a bench as JSON: the command that made it, where it ran, and its figures. Raises
    ValueError: the file cannot be written."""
    record = {
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "ratios": result.ratios,
        "raw": result.raw,
    }
    text = json.dumps(record, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}); give another file with --json"
        raise ValueError(message) from error


def print_result(result: BenchResult, title: str) -> None:
    """Print the rows of the bench as a table, and its ratios below, on stdout."""
    table = Table(*result.header, title=title)
    for row in result.table:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console().print(table)
    for name, ratio in result.ratios.items():
        print(f"{name}: {ratio:.4g}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine: processor, cores this process may use, threads of torch, memory in bytes, CUDA devices."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
