"""Blocks are copied bit for bit, nothing else is written, and every way of copying agrees."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.store.copy import copy as transfer
from offload_sparse.store.copy import kernels
from offload_sparse.store.copy import tables as packing
from offload_sparse.store.copy.copy import Block, BlockPlan, Grid, copy_blocks
from offload_sparse.store.copy.torch_copy import copy_by_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
Way = Callable[[BlockPlan, Sequence[tuple[Tensor, Tensor]], bool], None]


def by_torch(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    for source, target in pairs:
        copy_by_torch(plan.blocks, source, target, reverse)


def natively(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    kernel = kernels.load()
    assert kernel is not None
    transfer._copy_natively(kernel, plan, pairs, reverse)


def past_the_caches(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(transfer, "STREAM_FROM", 0)
        natively(plan, pairs, reverse)


WAYS: list[Way] = [by_torch, natively, past_the_caches]


@dataclass
class Case:
    """Blocks, the sizes of the two arrays, and the entries that belong together, by definition."""

    plan: BlockPlan
    sizes: tuple[int, int]
    entries: tuple[Tensor, Tensor]


def entries_of(block: Block, grid: Grid) -> Tensor:
    rows = torch.arange(block.n_rows) if grid.rows is None else grid.rows
    units = torch.arange(block.n_units) if grid.units is None else grid.units
    within = (units[:, None] * block.unit + torch.arange(block.unit)).flatten()
    return (grid.start + rows[:, None] * grid.row_length + within).flatten()


def numbers(data: st.DataObject, count: int, spread: int) -> tuple[Tensor | None, int]:
    """``count`` sorted numbers below a limit, and the limit; None for 0, 1, 2, …"""
    limit = count + data.draw(st.integers(0, spread))
    if data.draw(st.booleans()):
        return None, limit
    drawn = data.draw(st.sets(st.integers(0, limit - 1), min_size=count, max_size=count))
    return torch.tensor(sorted(drawn)), limit


@st.composite
def cases(draw: Callable[..., object]) -> Case:
    """Up to four blocks that lie one after the other in both arrays, with gaps."""
    data: st.DataObject = draw(st.data())  # type: ignore[assignment]
    blocks, ends, entries = [], [0, 0], ([], [])
    for _ in range(data.draw(st.integers(0, 4))):
        n_rows, n_units = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
        unit = data.draw(st.sampled_from([1, 1, 2, 3, 4, 8, 9, 70]))
        grids = []
        for side in range(2):
            rows, row_limit = numbers(data, n_rows, 5)
            units, unit_limit = numbers(data, n_units, 5)
            if data.draw(st.booleans()) and units is None:
                unit_limit = n_units
            ends[side] += data.draw(st.integers(0, 3))
            grids.append(Grid(ends[side], unit_limit * unit, rows, units))
            ends[side] += row_limit * unit_limit * unit
        block = Block(n_rows, n_units, unit, *grids)
        blocks.append(block)
        for side in range(2):
            entries[side].append(entries_of(block, grids[side]))
    empty = torch.zeros(0, dtype=torch.int64)
    ends = [end + data.draw(st.integers(0, 3)) for end in ends]
    flat = (torch.cat([empty, *entries[0]]), torch.cat([empty, *entries[1]]))
    return Case(BlockPlan(blocks), (ends[0], ends[1]), flat)


def random_bits(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype)


def bits(array: Tensor) -> Tensor:
    return array.view(torch.uint8)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80, deadline=None)
@given(case=cases(), dtype=st.sampled_from(DTYPES), reverse=st.booleans(), small=st.booleans())
def test_every_way_copies_exactly_the_blocks_bit_for_bit(
    way: Way, case: Case, dtype: torch.dtype, reverse: bool, small: bool
) -> None:
    limits = {"ITEM": 8, "LONGEST_RUN": 5, "RUN_FROM": 4} if small else {}
    pairs = [
        (random_bits(case.sizes[0], dtype, seed), random_bits(case.sizes[1], dtype, seed + 100))
        for seed in (1, 2)
    ]
    expected = [(bits(a).clone(), bits(b).clone()) for a, b in pairs]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(packing, name, value)
        way(case.plan, pairs, reverse)
    from_side, to_side = (1, 0) if reverse else (0, 1)
    for both in expected:
        source, target = (array.view(-1, dtype.itemsize) for array in (both[from_side], both[to_side]))
        target[case.entries[to_side]] = source[case.entries[from_side]]
    for pair, both in zip(pairs, expected, strict=True):
        assert all(torch.equal(bits(array), wanted) for array, wanted in zip(pair, both, strict=True))


@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_copying_back_undoes_a_copy(case: Case) -> None:
    source, target = (torch.randn(size) for size in case.sizes)
    before = source.clone()
    natively(case.plan, [(source, target)], False)
    source[case.entries[0]] = torch.nan
    natively(case.plan, [(source, target)], True)
    assert torch.equal(source, before)


@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_a_plan_knows_its_entries_its_extent_and_whether_it_fills_a_run(case: Case) -> None:
    plan = case.plan
    assert plan.entries == case.entries[0].numel() == case.entries[1].numel()
    for size, run, entries in (
        (plan.source_size, plan.source_run, case.entries[0]),
        (plan.target_size, plan.target_run, case.entries[1]),
    ):
        assert size == (int(entries.max()) + 1 if entries.numel() else 0)
        if run is not None and entries.numel():
            assert torch.equal(entries, torch.arange(*run))


def wide_case() -> tuple[BlockPlan, Tensor, Tensor]:
    """Enough entries for several threads: scattered units, whole rows, and one long run."""
    rows, units = torch.arange(0, 600, 2), torch.arange(0, 900, 3)
    blocks = [
        Block(300, 300, 3, Grid(0, 2700, rows, units), Grid(0, 900)),
        Block(300, 1, 2700, Grid(0, 2700, rows), Grid(270_000, 2700)),
        Block(600, 900, 3, Grid(0, 2700), Grid(1_080_000, 2700)),
    ]
    source = torch.randn(600 * 2700)
    return BlockPlan(blocks), source, torch.empty(2_700_000)


def test_threads_share_the_work_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, source, target = wide_case()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    natively(plan, [(source, target)], False)
    full = source.view(600, 2700)
    narrow = full[::2].view(300, 900, 3)[:, ::3]
    expected = torch.cat([narrow.flatten(), full[::2].flatten(), source])
    assert torch.equal(target, expected)


def test_two_threads_of_the_caller_may_transfer_at_once() -> None:
    plan, source, _ = wide_case()
    targets = [torch.zeros(2_700_000) for _ in range(2)]

    def work(target: Tensor) -> None:
        for _ in range(3):
            natively(plan, [(source, target)], False)

    threads = [threading.Thread(target=work, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*targets)
    assert torch.equal(targets[0][1_080_000:], source)


def test_items_are_small_enough_to_be_shared_out_and_cover_everything() -> None:
    plan = wide_case()[0]
    items, blocks = plan.packed.items, plan.packed.blocks
    entries = []
    for block, row, row_end, unit, unit_end in items:
        width, lengths = blocks[block, kernels.BLOCK_UNIT], blocks[block, kernels.BLOCK_LENGTHS]
        per_row = (
            width * (unit_end - unit)
            if lengths < 0
            else plan.packed.indices[lengths + unit : lengths + unit_end].sum()
        )
        entries.append(int((row_end - row) * per_row))
    assert sum(entries) == plan.entries
    assert max(entries) <= 2 * packing.ITEM


def test_neighbouring_units_become_longer_ones() -> None:
    eights = torch.cat([torch.arange(8), torch.arange(24, 40)])
    packed = BlockPlan([Block(5, 24, 1, Grid(0, 48, None, eights), Grid(0, 24))]).packed
    unit, lengths_at = packed.blocks[0][:2]
    assert (unit, lengths_at) == (8, -1)
    whole = BlockPlan([Block(5, 48, 2, Grid(0, 96), Grid(0, 96))]).packed
    assert len(whole.items) == 1
    lengths = whole.indices[whole.blocks[0][1] :][:1]
    assert lengths.tolist() == [480]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(9), torch.zeros(9, dtype=torch.float64), "one dtype"),
        (torch.zeros(3, 3), torch.zeros(9), "flat"),
        (torch.zeros(18)[::2], torch.zeros(9), "contiguous"),
        (torch.zeros(8), torch.zeros(9), "the source array has 8 entries"),
        (torch.zeros(9), torch.zeros(3), "the target array has 3 entries"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(source: Tensor, target: Tensor, message: str) -> None:
    plan = BlockPlan([Block(2, 1, 2, Grid(5, 2), Grid(0, 2))])
    with pytest.raises(ValueError, match=message):
        copy_blocks(plan, [(source, target)])


def test_blocks_with_wrong_counts_or_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="names 3 of them"):
        Block(2, 1, 1, Grid(0, 1, torch.arange(3)), Grid(0, 1))
    with pytest.raises(ValueError, match="0 or more"):
        BlockPlan([Block(1, 1, 1, Grid(-1, 1), Grid(0, 1))])


def test_without_a_kernel_torch_copies_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(kernels, "_compile", fail)
    monkeypatch.setattr(kernels, "_kernel", None)
    monkeypatch.setattr(kernels, "_tried", False)
    plan, source, target = wide_case()
    with caplog.at_level(logging.WARNING):
        copy_blocks(plan, [(source, target)])
        copy_blocks(plan, [(source, target)])
    assert torch.equal(target[1_080_000:], source)
    assert caplog.text.count("numba") >= 1
    assert len(caplog.records) == 1


def test_small_transfers_do_not_load_the_kernel() -> None:
    script = """
import sys, torch
from offload_sparse.store.copy.copy import *
copy_blocks(BlockPlan([Block(2, 1, 2, Grid(5, 2), Grid(0, 2))]), [(torch.zeros(9), torch.zeros(9))])
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kernel_looks_ahead_in_the_array_with_the_longer_rows(reverse: bool) -> None:
    units = torch.arange(0, 24, 2)
    sides = Grid(0, 24, None, units), Grid(0, 12, None, torch.arange(12))
    source, target = reversed(sides) if reverse else sides
    packed = BlockPlan([Block(5, 12, 1, source, target)]).packed
    columns = [kernels.SOURCE + kernels.GRID_AHEAD, kernels.TARGET + kernels.GRID_AHEAD]
    assert packed.blocks[0, columns].tolist() == ([0, 1] if reverse else [1, 0])


def test_sizes_that_the_planner_knows_are_checked_like_those_found_out() -> None:
    plan = BlockPlan([Block(2, 1, 2, Grid(0, 2), Grid(0, 2))], (9, 4))
    with pytest.raises(ValueError, match="the source array has 8 entries, the blocks need 9"):
        copy_blocks(plan, [(torch.zeros(8), torch.zeros(4))])
