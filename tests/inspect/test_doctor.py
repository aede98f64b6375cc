"""The doctor finds what is wrong, says what to do, and fails only where a run would."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from offload_sparse.cli.main import main
from offload_sparse.inspect import doctor
from offload_sparse.inspect.doctor import Finding
from offload_sparse.store.copy import host_copy
from tests.support.launches import launch

Usage = namedtuple("Usage", "total used free")


def one(findings: object, name: str) -> Finding:
    (found,) = [f for f in findings if f.name.startswith(name)]  # type: ignore[attr-defined]
    return found


def test_this_machine_can_run_the_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run_dir", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    names = {finding["name"] for finding in report["findings"]}
    assert {"packages", "native kernels", "shared memory", "NUMA nodes", "launch", "threads"} <= names
    assert main(["doctor", "--run_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 errors")


def test_an_error_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--run_dir", str(tmp_path / "file" / "runs")]) == 1
    output = capsys.readouterr().out
    assert "ERROR    run folder:" in output
    assert "fix: choose another folder: --run_dir" in output


def test_what_is_not_ok_needs_a_fix() -> None:
    with pytest.raises(AssertionError):
        Finding("x", "warning", "y")
    with pytest.raises(AssertionError):
        Finding("x", "ok", "y", "z")


# --- software ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "version", "state", "found"),
    [
        ("torch>=2.11", "2.11", "ok", "2.11"),
        ("torch>=2.11", "2.10.1", "error", "2.10.1, but >=2.11 is needed"),
        ("torch>=2.11", "", "error", "not installed"),
    ],
)
def test_a_requirement_is_compared_with_what_is_installed(
    requirement: str, version: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    finding = doctor._required(Requirement(requirement))
    assert (finding.state, finding.found) == (state, found)
    assert finding.fix == ("" if state == "ok" else "pip install 'torch>=2.11'")


def test_a_package_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (finding,) = doctor.check_packages()
    assert finding.state == "warning"
    assert "pip install -e ." in finding.fix


def test_kernels_that_cannot_be_compiled_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "load", lambda: None)
    assert doctor.check_kernels().state == "warning"


# --- the system --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "has_gpu", "state"),
    [(resource.RLIM_INFINITY, True, "ok"), (1 << 16, False, "ok"), (1 << 16, True, "warning")],
)
def test_a_limit_on_locked_memory_matters_with_a_gpu(
    limit: int, has_gpu: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert doctor._locked_memory(has_gpu).state == state


@pytest.mark.parametrize(("gib", "state"), [(0, "warning"), (0.0625, "warning"), (8, "ok")])
def test_small_shared_memory_is_a_warning(gib: float, state: str) -> None:
    assert doctor._shared_memory(int(gib * 2**30)).state == state


@pytest.mark.parametrize(("nodes", "state"), [(0, "ok"), (1, "ok"), (2, "warning")])
def test_several_numa_nodes_are_told(nodes: int, state: str, tmp_path: Path) -> None:
    for number in range(nodes):
        (tmp_path / f"node{number}").mkdir()
    (tmp_path / "nodes_online").mkdir()
    assert doctor._numa(tmp_path).state == state


@pytest.mark.parametrize(
    ("library", "deepspeed", "state"),
    [("libaio.so.1", True, "ok"), (None, False, "ok"), (None, True, "warning")],
)
def test_libaio_matters_with_deepspeed(
    library: str | None, deepspeed: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: deepspeed or None)
    assert doctor._libaio().state == state


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1000))
    finding = doctor._writable("run folder", tmp_path / "new")
    assert finding.state == "warning"
    assert not (tmp_path / "new").exists(), "looking leaves nothing behind"


# --- devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "built", "state", "advice"),
    [
        (None, None, "ok", ""),
        ("/usr/bin/nvidia-smi", None, "error", "install a CUDA build"),
        ("/usr/bin/nvidia-smi", "13.2", "error", "driver for CUDA 13.2"),
    ],
)
def test_a_driver_without_a_device_is_an_error(
    driver: str | None, built: str | None, state: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.check_devices()
    assert finding.state == state
    assert advice in finding.fix


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_probe_that_fails_is_a_finding(kind: type[Exception]) -> None:
    def fail() -> Finding:
        raise kind("CUDA error:\n an illegal memory access")

    finding = doctor._guarded("GPU 0", fail)
    assert (finding.state, finding.found) == ("error", "CUDA error: an illegal memory access")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bus_of_every_device_is_measured() -> None:
    findings = list(doctor.check_devices())
    assert len(findings) == 2 * torch.cuda.device_count()
    assert all("GB/s" in finding.found for finding in findings[1::2])


# --- the launch --------------------------------------------------------------------------------------


def test_processes_that_cannot_find_each_other_are_an_error() -> None:
    finding = one(doctor.check_launch({"SLURM_STEP_NUM_TASKS": "2"}), "launch")
    assert finding.state == "error"
    assert "start one accelerate launch per node" in finding.fix


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    finding = one(doctor.check_launch({}), "threads")
    assert finding.state == "warning"
    assert finding.fix.startswith("export OMP_NUM_THREADS=")


def test_the_doctor_compares_the_launcher_with_accelerate(tmp_path: Path) -> None:
    """Two ranks as a user starts them; one of them speaks."""
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "29641"]
    arguments = ["doctor", "--json", "--run_dir", str(tmp_path)]
    done = launch(arguments, launcher, "offload_sparse.cli", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {finding["name"]: finding["found"] for finding in json.loads(line)["findings"]}
    assert found["launch"] == "2 processes by the launcher, 2 by accelerate"

