"""Versions of what the package stands on, and whether its native parts work."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from offload_sparse.inspect.doctor.finding import Finding

_DISTRIBUTION = "offload-sparse"
_OLDEST_PYTHON = (3, 11)
_OPTIONAL = {
    "onnx": ("export and evaluate ONNX files", "pip install 'offload-sparse[onnx]'"),
    "onnxruntime": ("evaluate ONNX files", "pip install 'offload-sparse[onnx]'"),
    "deepspeed": ("use the store tier nvme", "pip install 'offload-sparse[deepspeed]'"),
}


def check_software() -> Iterator[Finding]:
    """Python, required and optional packages, the native kernels, the compiler."""
    yield _python()
    yield from _packages()
    yield _kernels()
    yield _compiler()


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return Finding("python", "ok", version)
    return Finding("python", "error", version, "install Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    """Every requirement of the package, against what is installed."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        found = "the package runs from its folder and is not installed"
        yield Finding("packages", "warning", found, "pip install -e . (in the folder of the repository)")
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield _required(requirement)
    for name, (purpose, command) in _OPTIONAL.items():
        version = _version(name)
        if version:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "warning", "not installed", f"to {purpose}: {command}")


def _required(requirement: Requirement) -> Finding:
    version = _version(requirement.name)
    command = f"pip install '{requirement}'"
    if not version:
        return Finding(requirement.name, "error", "not installed", command)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            requirement.name, "error", f"{version}, but {requirement.specifier} is needed", command
        )
    return Finding(requirement.name, "ok", version)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _kernels() -> Finding:
    """Move a small slice by the native kernel and compare it with torch's indexing."""
    import torch

    from offload_sparse.store.copy.blocks import Block, Grid
    from offload_sparse.store.copy.copy import BlockPlan, copy_blocks
    from offload_sparse.store.copy.kernels import load

    if load() is None:
        fix = "reinstall numba, or set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding("native kernels", "warning", "numba cannot compile them: transfers are slower", fix)
    rows, columns = torch.arange(0, 64, 2), torch.arange(0, 64, 3)
    source = torch.randn(64 * 64)
    out = torch.empty(len(rows) * len(columns))
    block = Block(len(rows), len(columns), 1, Grid(0, 64, rows, columns), Grid(0, len(columns)))
    copy_blocks(BlockPlan([block]), [(source, out)])
    if torch.equal(out.view(len(rows), -1), source.view(64, 64)[rows][:, columns]):
        return Finding("native kernels", "ok", "compiled, and a slice arrives whole")
    return Finding("native kernels", "error", "a slice arrives changed", "set NUMBA_CPU_NAME=generic")


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found:
        return Finding("compiler", "ok", found)
    fix = "install one, such as apt-get install g++, to compile subnets or to use the store tier nvme"
    return Finding("compiler", "warning", "no C++ compiler", fix)
