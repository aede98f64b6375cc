"""Transfers past the page cache move what transfers through memory move, and read no byte twice."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.channels.selection import Selection
from offload_sparse.store import direct_files
from offload_sparse.store.copy.blocks import BlockPlan, Numbers
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.direct_files import ALIGN, DirectFiles, open_handle, windows
from offload_sparse.store.tiers import FileTier, Identity, MemoryTier
from offload_sparse.store.weight_store import WeightStore
from tests.support.blocks import Block, Grid, plan_of


@dataclass
class Plain:
    """DeepNVMe's handle by ordinary reads and writes, which happen when they are waited for."""

    begun: list[tuple[bool, Tensor, str, int]] = field(default_factory=list)
    bytes_read: Counter[str] = field(default_factory=Counter)

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int) -> int:
        self.begun.append((False, buffer, filename, file_offset))
        return 0

    def async_pwrite(self, buffer: Tensor, filename: str, file_offset: int) -> int:
        self.begun.append((True, buffer, filename, file_offset))
        return 0

    def wait(self) -> int:
        done = 0
        for writes, buffer, filename, offset in self.begun:
            data = buffer.view(torch.uint8).numpy()
            assert not offset % ALIGN
            assert not data.nbytes % ALIGN
            descriptor = os.open(filename, os.O_RDWR)
            moved = (os.pwritev if writes else os.preadv)(descriptor, [memoryview(data)], offset)
            os.close(descriptor)
            self.bytes_read[filename] += 0 if writes else moved
            done += moved == data.nbytes
        self.begun.clear()
        return done

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        return torch.full((num_elem,), 7).to(example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return True


def positions(draw: st.DrawFn, size: int) -> Numbers:
    kept = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    return np.array(sorted(kept), np.int64)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BlockPlan, int, int]:
    """Rows and columns of a few matrices, one behind the other; the entries of both arrays."""
    blocks, source, target = [], 0, 0
    for _ in range(draw(st.integers(1, 3))):
        n_rows, n_columns, unit = (
            draw(st.integers(1, 40)),
            draw(st.integers(1, 60)),
            draw(st.sampled_from([1, 9])),
        )
        rows, columns = positions(draw, n_rows), positions(draw, n_columns)
        size = len(rows), len(columns), unit
        there = Grid(target, len(columns) * unit)
        blocks.append(Block(*size, Grid(source, n_columns * unit, rows, columns), there))
        source += n_rows * n_columns * unit
        target += len(rows) * len(columns) * unit
    return plan_of(blocks, (source, target)), source, target


def file_of(folder: Path, kind: str, values: Tensor) -> Path:
    path = folder / f"{kind}.bin"
    data = values.numpy().tobytes()
    path.write_bytes(data + bytes(-len(data) % ALIGN))
    return path


@settings(max_examples=40, deadline=None)
@given(case=plans(), window=st.sampled_from([ALIGN, 3 * ALIGN, 64 << 20]))
def test_files_give_and_take_the_bits_that_memory_does(
    case: tuple[BlockPlan, int, int], window: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan, source, target = case
    folder = tmp_path_factory.mktemp("files")
    kinds = ("weights", "slot")
    arrays = {kind: torch.randn(source) for kind in kinds}
    files = {kind: file_of(folder, kind, array) for kind, array in arrays.items()}
    direct = DirectFiles(Plain(), files, torch.float32)

    found, expected = ({kind: torch.zeros(target) for kind in kinds} for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_files, "WINDOW", window)
        direct.copy(plan, list(found.items()))
    copy_blocks(plan, [(arrays[kind], expected[kind]) for kind in kinds])
    assert all(torch.equal(found[kind], expected[kind]) for kind in kinds)

    trained = {kind: torch.randn(target) for kind in kinds}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_files, "WINDOW", window)
        direct.copy(plan, list(trained.items()), reverse=True)
    copy_blocks(plan, [(arrays[kind], trained[kind]) for kind in kinds], reverse=True)
    for kind in kinds:
        assert files[kind].read_bytes()[: 4 * source] == arrays[kind].numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(case=plans(), size=st.integers(1, 500))
def test_windows_hold_every_entry_once_and_begin_in_order(
    case: tuple[BlockPlan, int, int], size: int
) -> None:
    plan, source, target = case
    values, narrow, expected = torch.arange(source + 64.0), torch.full((target,), -1.0), torch.empty(target)
    found = windows(plan, size, 16)
    for window in found:
        assert not window.first % 16
        assert not window.last % 16
        copy_blocks(window.plan, [(values[window.first : window.last + 16].contiguous(), narrow)])
    copy_blocks(plan, [(values, expected)])
    assert torch.equal(narrow, expected)
    assert sum(window.plan.entries for window in found) == plan.entries
    assert [w.first for w in found] == sorted(w.first for w in found)


def test_a_file_is_read_once_for_all_blocks_in_it(tmp_path: Path) -> None:
    values = torch.randn(64, 1024)
    path = file_of(tmp_path, "weights", values.flatten())
    even, odd = np.arange(0, 64, 2), np.arange(1, 64, 2)
    blocks = [
        Block(32, 1024, 1, Grid(0, 1024, even), Grid(0, 1024)),
        Block(32, 1024, 1, Grid(0, 1024, odd), Grid(32 * 1024, 1024)),
    ]
    handle, narrow = Plain(), torch.empty(64 * 1024)
    DirectFiles(handle, {"weights": path}, torch.float32).copy(plan_of(blocks), [("weights", narrow)])
    assert torch.equal(narrow.view(64, 1024), values[np.concatenate([even, odd])])
    assert handle.bytes_read[str(path)] == path.stat().st_size


def test_a_read_that_fails_is_told(tmp_path: Path) -> None:
    path = file_of(tmp_path, "weights", torch.randn(10))
    os.truncate(path, 100)
    plan = plan_of([Block(1, 10, 1, Grid(0, 10), Grid(0, 10))])
    with pytest.raises(OSError, match="weights"):
        DirectFiles(Plain(), {"weights": path}, torch.float32).copy(plan, [("weights", torch.empty(10))])


ATOMS = torch.arange(300)
MAP = ChannelMap(
    (Group("a", 0, 300),),
    {"w": (300, 500), "v": (400, 300), "b": (300,)},
    {"w": (ATOMS, None), "v": (None, ATOMS), "b": (ATOMS,)},
)


@pytest.mark.slow
def test_deepnvme_moves_the_bits_that_memory_does(tmp_path: Path) -> None:
    """The real one: a store past the page cache, rounds of gather and scatter, and its file opened again."""
    handle = open_handle(tmp_path)
    if handle is None:
        pytest.skip("DeepNVMe is not to be had here")
    identity = Identity.of("run", MAP, torch.float32, 1, 0)
    tier = FileTier(tmp_path / "store", identity, open_direct=lambda _: handle)
    stores = [
        WeightStore(MAP, ("w", "v"), ("b",), ("slot",), tier=t)
        for t in (tier, MemoryTier(torch.float32, "off"))
    ]
    for store in stores:
        generator = torch.Generator().manual_seed(0)
        store.fill((name, torch.randn(shape, generator=generator)) for name, shape in MAP.shapes.items())
    tier.complete({})
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        selection = Selection(MAP, torch.rand(300, generator=generator) < 0.3)
        for kind in ("weights", "slot", "buffers"):
            size = selection.layout(stores[0].partitions[kind].layout.shapes).size
            narrow = [torch.empty(size) for _ in stores]
            for store, values in zip(stores, narrow, strict=True):
                store.gather(selection, kind, values)
                store.scatter(selection, kind, values * 2 + 1)
            assert torch.equal(*narrow)
    tier.sync()
    again = WeightStore(
        MAP, ("w", "v"), ("b",), ("slot",), tier=FileTier(tmp_path / "store", identity, mode="resume")
    )
    for kind in ("weights", "slot", "buffers"):
        assert torch.equal(again.arrays[kind], stores[1].arrays[kind])
