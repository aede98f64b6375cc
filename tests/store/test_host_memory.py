"""Host memory: zeroed, of exact size, and unregistered whatever happens."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from offload_sparse.store import host_memory
from offload_sparse.store.host_memory import HUGE_FROM, host_zeros, pin_mode, register
from tests.support import fork_server


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("numel", [0, 3, HUGE_FROM // 2 + 5])
def test_memory_is_zeroed_and_of_exact_size(dtype: torch.dtype, numel: int) -> None:
    tensor = host_zeros(numel, dtype, "off")
    assert tensor.dtype == dtype
    assert tensor.shape == (numel,)
    assert tensor.untyped_storage().nbytes() == numel * dtype.itemsize
    assert not tensor.to(torch.float32).count_nonzero()
    tensor.fill_(1.0)
    assert int(tensor.to(torch.float64).sum()) == numel


def test_threads_that_touch_side_by_side_leave_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "TOUCH_CHUNK", 1000)
    monkeypatch.setattr(host_memory, "threads", lambda: 3)
    tensor = torch.ones(12345)
    host_memory._touch(tensor)
    assert not tensor.count_nonzero()


class Driver:
    """Counts what a CUDA driver would hold registered; refuses from the ``limit``-th call on."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.held: dict[int, int] = {}
        self.calls = 0
        self.limit = limit

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls += 1
        if self.calls > self.limit:
            return 2
        self.held[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.held[address]


def test_memory_is_registered_in_chunks_without_gaps() -> None:
    driver, tensor = Driver(), torch.zeros(25, dtype=torch.uint8)
    assert register(tensor, None, driver, chunk=10) == 0
    start = tensor.data_ptr()
    assert driver.held == {start: 10, start + 10: 10, start + 20: 5}
    del tensor
    gc.collect()
    assert driver.held == {}


def test_a_refusal_leaves_nothing_registered() -> None:
    driver, tensor = Driver(limit=2), torch.zeros(100, dtype=torch.uint8)
    assert register(tensor, None, driver, chunk=10) == 2
    assert driver.held == {}


def test_memory_is_unregistered_when_its_last_view_goes() -> None:
    driver = Driver()
    tensor = host_zeros(1000, torch.float32, "off")
    register(tensor, None, driver)
    view = tensor[10:20]
    del tensor
    gc.collect()
    assert driver.held
    del view
    gc.collect()
    assert not driver.held


def test_memory_is_unregistered_when_the_process_ends() -> None:
    """With an error or without one: a process and its child."""
    done = fork_server.shared().run(f"{__name__}:ends_registered", [], os.environ, 120, unwinds=True)
    assert done.stdout == "with an error\nwithout one\n", done.stderr


def ends_registered(_: list[str]) -> None:
    child = os.fork()
    tensor = host_zeros(1000, torch.float32, "off")
    vars(sys.modules["__main__"])["tensor"] = tensor  # as a script has it until its interpreter has ended
    said = "with an error" if child == 0 else "without one"
    driver = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: 0,
        cudaHostUnregister=lambda address: print(said, flush=True),
    )
    register(tensor, None, driver)
    if child == 0:
        raise RuntimeError("a step failed")
    os.waitpid(child, 0)


def test_only_cuda_devices_pin_and_a_wish_that_cannot_be_met_is_an_error() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [pin_mode(pin, cuda) for pin in ("auto", "on", "off")] == ["auto", "on", "off"]
    assert [pin_mode(pin, cpu) for pin in ("auto", "off")] == ["off", "off"]
    with pytest.raises(ValueError, match=r"set store\.pin to auto"):
        pin_mode("on", cpu)


def test_memory_that_the_machine_does_not_have_is_one_line_with_advice() -> None:
    with pytest.raises(ValueError, match=r"^1048576\.0 GiB of host memory .*set store\.tier to file$"):
        host_zeros(1 << 50, torch.uint8, "off")


def test_auto_goes_on_without_page_locks_and_on_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Cudart:
        cudaHostRegister = staticmethod(lambda address, size, flags: 2)
        cudaHostUnregister = staticmethod(lambda address: 0)

    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(host_memory, "forget_cuda_error", lambda: taken.append("error"))
    assert host_zeros(10, torch.float32, "auto").shape == (10,)
    assert "ulimit" in caplog.text
    with pytest.raises(ValueError, match=r"set store\.pin to off"):
        host_zeros(10, torch.float32, "on")
    assert taken == ["error"] * 2, "a refusal leaves CUDA's error state set: the next kernel would raise it"


def test_the_error_of_a_refusal_is_taken_by_a_kernel_that_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime raises it at the first launch after the refusal, and then goes on."""
    pending = ["invalid argument"]

    def launch(*args: object, **kwargs: object) -> None:
        if pending:
            raise RuntimeError(f"CUDA error: {pending.pop()}")

    monkeypatch.setattr(torch, "zeros", launch)
    monkeypatch.setattr(torch.cuda, "synchronize", launch)
    host_memory.forget_cuda_error()
    assert not pending


@pytest.mark.parametrize(
    ("cores", "local", "expected"), [(16, None, 16), (16, "4", 4), (2, "8", 1), (16, "1", 16)]
)
def test_copies_use_this_ranks_share_of_the_cores_whatever_openmp_is_told(
    monkeypatch: pytest.MonkeyPatch, cores: int, local: str | None, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert host_memory.threads() == expected


_FORKED = """
import os, signal, torch
from offload_sparse.store.host_memory import host_zeros

def resident(processes):  # proportional: a page that processes share counts once
    lines = [line for p in processes for line in open(f"/proc/{p}/smaps_rollup") if line.startswith("Pss:")]
    return sum(int(line.split()[1]) for line in lines)

store = host_zeros(64 << 20, torch.float32, "off")
before = resident([os.getpid()])
workers = []
for _ in range(2):
    if (pid := os.fork()) == 0:
        signal.pause()
    workers.append(pid)
store.fill_(1.0)
after = resident([os.getpid(), *workers])
for pid in workers:
    os.kill(pid, signal.SIGKILL)
print(after / before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read from /proc")
def test_forked_workers_get_no_copy_of_the_store() -> None:
    """256 MiB that are written after two forks; a copy would be 1.5 times the memory."""
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) <= 1.05, done.stderr
