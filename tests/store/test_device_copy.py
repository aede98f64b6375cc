"""What a CUDA device does, as far as it runs without one: staging on the CPU, Triton in its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sparse.store.copy import device_copy
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.device_copy import copy_staged
from tests.support.blocks import DTYPES, Case, bits, cases, random_bits, wide_case


@settings(max_examples=40, deadline=None)
@given(
    case=cases(), dtype=st.sampled_from(DTYPES), reverse=st.booleans(), stage=st.sampled_from([1, 50, 10**6])
)
def test_staged_copies_equal_direct_ones(case: Case, dtype: torch.dtype, reverse: bool, stage: int) -> None:
    source, target = (random_bits(size, dtype, seed) for seed, size in enumerate(case.sizes))
    expected = source.clone(), target.clone()
    copy_blocks(case.plan, [expected], reverse)
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
