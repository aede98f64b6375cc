"""Blocks are copied bit for bit, nothing else is written, and every way of copying agrees."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.store.copy import host_copy, tables, torch_copy
from offload_sparse.store.copy.blocks import SOURCE, TARGET, BlockPlan, part_of_matrix
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.tables import DeviceTables, Tables
from tests.support import fork_server
from tests.support.blocks import DTYPES, Block, Case, Grid, bits, cases, plan_of, random_bits, wide_case

Way = Callable[[BlockPlan, Sequence[tuple[Tensor, Tensor]], bool], None]


def by_torch(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    for source, target in pairs if plan.entries else ():
        torch_copy.copy_by_torch(plan, source, target, reverse)


def by_torch_in_chunks(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch_copy, "CHUNK", 20)
        by_torch(plan, pairs, reverse)


def natively(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    kernel = host_copy.load()
    assert kernel is not None
    host_copy.copy_natively(kernel, plan, pairs, reverse)


def past_the_caches(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(host_copy, "STREAM_FROM", 0)
        natively(plan, pairs, reverse)


def by_programs(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    """What the kernel of a device makes of its tables, one program after the other."""
    plans = [plan, plan] if plan.entries else []
    for found in DeviceTables.of(plans, torch.device("cpu"), 7) if plans else []:
        programs, blocks, indices = (table.numpy() for table in found)
        for number, first, last in programs:
            unit, n_units, *grids = blocks[number]
            whole, rest = np.divmod(np.arange(first, last), unit)
            row, number = np.divmod(whole, n_units)
            here, there = (
                start + indices[rows + row] * length + indices[units + number] * unit + rest
                for start, length, rows, units in (grids[:4], grids[4:])
            )
            for source, target in pairs:
                if reverse:
                    source[here] = target[there]
                else:
                    target[there] = source[here]


WAYS: list[Way] = [by_torch, by_torch_in_chunks, natively, past_the_caches, by_programs]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
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
            patch.setattr(tables, name, value)
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
    for side, entries in ((SOURCE, case.entries[0]), (TARGET, case.entries[1])) if plan.entries else ():
        first, end = plan.ends(side)
        assert (first.min(), end.max()) == (entries.min(), entries.max() + 1)
        run = plan.run(side)
        assert (run is not None) == torch.equal(entries, torch.arange(first.min(), end.max()))
        assert run is None or (run.start, run.stop) == (first.min(), end.max())


def test_threads_share_the_work_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, source, target = wide_case()
    monkeypatch.setattr(host_copy, "threads", lambda: 3)
    host_copy._pool.cache_clear()
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
    packed = plan.derived(Tables)
    items, blocks = packed.items, packed.blocks
    entries = []
    for block, row, row_end, unit, unit_end in items:
        width, lengths = blocks[block, tables.BLOCK_UNIT], blocks[block, tables.BLOCK_LENGTHS]
        per_row = (
            width * (unit_end - unit)
            if lengths < 0
            else packed.indices[lengths + unit : lengths + unit_end].sum()
        )
        entries.append(int((row_end - row) * per_row))
    assert sum(entries) == plan.entries
    assert max(entries) <= 2 * tables.ITEM


def test_neighbouring_units_become_longer_ones() -> None:
    eights = np.concatenate([np.arange(8), np.arange(24, 40)])
    packed = Tables(plan_of([Block(5, 24, 1, Grid(0, 48, None, eights), Grid(0, 24))]))
    unit, lengths_at = packed.blocks[0][:2]
    assert (unit, lengths_at) == (8, -1)
    whole = Tables(plan_of([Block(5, 48, 2, Grid(0, 96), Grid(0, 96))]))
    assert len(whole.items) == 1
    lengths = whole.indices[whole.blocks[0][1] :][:1]
    assert lengths.tolist() == [480]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(9), torch.zeros(9, dtype=torch.float64), r"arrays of torch\.float32 and torch\.float64"),
        (torch.zeros(3, 3), torch.zeros(9), "not flat"),
        (torch.zeros(18)[::2], torch.zeros(9), "has gaps"),
        (torch.zeros(8), torch.zeros(9), "8 entries, the blocks need 9"),
        (torch.zeros(9), torch.zeros(3), "3 entries, the blocks need 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(source: Tensor, target: Tensor, message: str) -> None:
    """Whose sizes are those that the planner says, wherever the blocks end."""
    plan = plan_of([Block(2, 1, 2, Grid(0, 2), Grid(0, 2))], (9, 4))
    with pytest.raises(AssertionError, match=message):
        copy_blocks(plan, [(source, target)])


def test_without_a_kernel_torch_copies_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("No module named 'numba'")

    from offload_sparse.store.copy import native

    monkeypatch.setattr(native, "compiled", fail)
    monkeypatch.setattr(host_copy, "load", cache(host_copy.load.__wrapped__))
    plan, source, target = wide_case()
    with caplog.at_level(logging.WARNING):
        copy_blocks(plan, [(source, target)])
        copy_blocks(plan, [(source, target)])
    assert torch.equal(target[1_080_000:], source)
    assert caplog.text.count("numba") >= 1
    assert len(caplog.records) == 1


def test_small_transfers_do_not_load_the_kernel() -> None:
    done = fork_server.shared().run(f"{__name__}:copies_little", [], os.environ, 120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def copies_little(_: list[str]) -> None:
    """In a process that has imported all that a run needs."""
    plan = part_of_matrix((3, 3, 1), np.arange(2), np.arange(1, 3))
    copy_blocks(plan, [(torch.zeros(9), torch.zeros(9))])
    print("numba" in sys.modules)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kernel_looks_ahead_in_the_array_with_the_longer_rows(reverse: bool) -> None:
    units = np.arange(0, 24, 2)
    sides = Grid(0, 24, None, units), Grid(0, 12, None, np.arange(12))
    source, target = reversed(sides) if reverse else sides
    packed = Tables(plan_of([Block(5, 12, 1, source, target)]))
    columns = [tables.SOURCE + tables.GRID_AHEAD, tables.TARGET + tables.GRID_AHEAD]
    assert packed.blocks[0, columns].tolist() == ([0, 1] if reverse else [1, 0])
