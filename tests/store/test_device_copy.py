"""What a CUDA device does, as far as it runs without one: staging on the CPU, Triton in its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.store.copy import device_copy
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.device_copy import copy_staged
from tests.support.blocks import DTYPES, Block, Case, Grid, bits, cases, plan_of, random_bits, wide_case


@settings(max_examples=40, deadline=None)
@given(
    case=cases(), dtype=st.sampled_from(DTYPES), reverse=st.booleans(), stage=st.sampled_from([1, 50, 10**6])
)
def test_staged_copies_equal_direct_ones(case: Case, dtype: torch.dtype, reverse: bool, stage: int) -> None:
    source, target = (random_bits(size, dtype, seed) for seed, size in enumerate(case.sizes))
    expected = source.clone(), target.clone()
    copy_blocks(case.plan, [expected], reverse)
    if not case.plan.entries:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_copy, "STAGE", stage)
        copy_staged(case.plan, source, target, reverse)
    assert torch.equal(bits(source), bits(expected[0]))
    assert torch.equal(bits(target), bits(expected[1]))


_INTERPRETED = """
import torch
from hypothesis import given, settings, strategies as st
from offload_sparse.store.copy import device_copy
from offload_sparse.store.copy.copy import copy_blocks
from tests.support.blocks import DTYPES, bits, cases, random_bits

@settings(max_examples=8, deadline=None, database=None)
@given(cases(), st.sampled_from(DTYPES), st.booleans())
def agree(case, dtype, reverse):
    if not case.plan.entries:
        return
    source, target = (random_bits(size, dtype, seed) for seed, size in enumerate(case.sizes))
    expected = source.clone(), target.clone()
    copy_blocks(case.plan, [expected], reverse)
    device_copy.launch(case.plan, source, target, reverse, torch.device("cpu"))
    assert torch.equal(bits(source), bits(expected[0]))
    assert torch.equal(bits(target), bits(expected[1]))

device_copy.PROGRAM, device_copy.STEP = 64, 32
agree()
print("agreed")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_in_its_interpreter_copies_bit_for_bit() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout == "agreed\n", done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("words", ["*i8", "*i16", "*i32", "*i64"])
@pytest.mark.parametrize(
    ("backend", "arch", "warp", "binary"),
    [
        ("cuda", 80, 32, "cubin"),
        ("cuda", 90, 32, "cubin"),
        ("cuda", 100, 32, "cubin"),
        ("hip", "gfx942", 64, "hsaco"),
    ],
)
@pytest.mark.parametrize("grids", [(2, 6), (6, 2)])
def test_the_triton_kernel_compiles_for_devices_that_are_not_here(
    words: str, backend: str, arch: int | str, warp: int, binary: str, grids: tuple[int, int]
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tables = dict.fromkeys(("programs", "blocks", "indices"), "*i64")
    constants = {"from_grid": grids[0], "to_grid": grids[1], "step": device_copy.STEP}
    signature = tables | {"source": words, "target": words} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(device_copy.copy_programs, signature, constants)
    assert len(triton.compile(source, target=GPUTarget(backend, arch, warp)).asm[binary]) > 1000


@pytest.fixture(autouse=True)
def nothing_found_out() -> Iterator[None]:
    """What was found out about a device holds for one test."""
    yield
    device_copy.triton_works.cache_clear()
    device_copy.zero_copy_is_faster.cache_clear()


def fail(*arguments: object) -> None:
    raise RuntimeError("PTX was compiled with an unsupported toolchain")


@pytest.mark.parametrize("way", ["it raises", "it copies nothing"])
def test_a_triton_that_does_not_work_is_found_out_once_and_torch_copies(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_copy, "launch", fail if way == "it raises" else lambda *arguments: None)
    plan, source, target = wide_case()
    expected = torch.empty_like(target)
    copy_blocks(plan, [(source, expected)])
    for _ in range(2):
        device_copy._copy_on_device(plan, source, target, False)
    assert torch.equal(target, expected)
    assert len(caplog.records) == 1
    assert "go through torch" in caplog.text
    assert not device_copy.zero_copy_is_faster(torch.device("cpu"), True, device_copy.NARROW)


@pytest.mark.parametrize("direct_wins", [("to", 1), ("from", 9)])
def test_ways_are_compared_per_direction_and_unit_and_only_once(
    direct_wins: tuple[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, str]] = []

    def probe(unit: int, device: torch.device, size: int, pin: str) -> tuple[int, Tensor, Tensor]:
        asked.append((unit, pin))
        return unit, torch.empty(0), torch.empty(0)

    def launch(unit: int, host: Tensor, out: Tensor, to_host: bool, device: torch.device) -> float:
        return 1.0 if ("to" if to_host else "from", unit) == direct_wins else 3.0

    monkeypatch.setattr(device_copy, "triton_works", lambda device: True)
    monkeypatch.setattr(device_copy, "_probe", probe)
    monkeypatch.setattr(device_copy, "launch", launch)
    monkeypatch.setattr(device_copy, "copy_staged", lambda *arguments: 2.0)
    monkeypatch.setattr(device_copy, "_seconds", lambda transfer, device: transfer())
    device = torch.device("cpu")
    ways = [(way, unit) for way in ("to", "from") for unit in (device_copy.NARROW, device_copy.WIDE)]
    for _ in range(2):
        faster = [device_copy.zero_copy_is_faster(device, way == "to", unit) for way, unit in ways]
        assert faster == [way == direct_wins for way in ways]
    assert asked == [(1, "on"), (9, "on"), (1, "on"), (9, "on")]


@pytest.mark.parametrize(("unit", "kind"), [(1, "NARROW"), (2, "NARROW"), (4, "WIDE"), (9, "WIDE")])
def test_a_plan_takes_the_way_of_the_unit_that_is_nearer(unit: int, kind: str) -> None:
    block = Block(4, 5, unit, Grid(0, 10 * unit, None, np.arange(0, 10, 2)), Grid(0, 5 * unit))
    assert device_copy._unit(plan_of([block])) == getattr(device_copy, kind)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["direct", "staged", "device"])
@pytest.mark.parametrize("pin", ["on", "off"])
def test_the_device_copies_as_the_host_does(way: str, pin: str) -> None:
    """Written without a GPU at hand: not yet run on one."""
    from offload_sparse.store.host_memory import host_zeros

    plan, source, target = wide_case()
    copy_blocks(plan, [(source, target)])
    host = host_zeros(source.numel(), torch.float32, pin)  # type: ignore[arg-type]
    host.copy_(source)
    given_array = host.cuda() if way == "device" else host
    out = torch.empty_like(target, device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_copy, "zero_copy_is_faster", lambda *asked: way == "direct")
        copy_blocks(plan, [(given_array, out)])
        assert torch.equal(out.cpu(), target)
        given_array.zero_()
        copy_blocks(plan, [(given_array, out)], reverse=True)
        torch.cuda.synchronize()
    assert torch.equal(given_array.cpu(), source)
