"""The store: what a rank's rows are, and that gather and scatter move exactly the kept entries."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.store.partition import Partition, row_shape
from offload_sparse.store.transfer import gather, scatter
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore
from offload_sparse.structure.channel_map import ChannelMap
from offload_sparse.structure.selection import Layout, Selection, shared_positions
from tests.channel_maps import channel_maps, masks


def full_tensors(channel_map: ChannelMap) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in channel_map.shapes.items()}


def stores(channel_map: ChannelMap, world_size: int) -> list[WeightStore]:
    """The stores of all ranks, side by side in one process (their exchange is tested with real groups)."""
    names = tuple(channel_map.shapes)
    made = [
        WeightStore(channel_map, names, (), ("momentum_buffer",), ranks=Ranks(rank, world_size))
        for rank in range(world_size)
    ]
    for store in made:
        store.fill(full_tensors(channel_map).items())
    return made


def narrow(channel_map: ChannelMap, selection: Selection) -> Tensor:
    """The narrow flat buffer by definition: every tensor sliced, one after the other."""
    tensors = full_tensors(channel_map)
    return torch.cat([selection.take(name, tensors[name]).flatten() for name in tensors])


@given(channel_maps(), st.integers(1, 5))
def test_every_row_has_exactly_one_owner_and_ranks_own_runs_of_the_full_buffer(
    channel_map: ChannelMap, world_size: int
) -> None:
    partition = Partition(Layout.of(dict(channel_map.shapes)), world_size)
    for name, shape in channel_map.shapes.items():
        ranges = [partition.rows(name, rank) for rank in range(world_size)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == row_shape(shape)[0]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    longest = max(row_shape(shape)[1] for shape in channel_map.shapes.values())
    for rank in range(world_size):
        assert abs(partition.shard(rank).size - partition.layout.size / world_size) <= longest + 1


@given(st.data(), channel_maps(), st.integers(1, 4))
def test_the_ranks_runs_together_are_the_narrow_buffer(
    data: st.DataObject, channel_map: ChannelMap, world: int
) -> None:
    selection = Selection(channel_map, data.draw(masks(channel_map)))
    expected = narrow(channel_map, selection)
    assembled = torch.full_like(expected, torch.nan)
    end = 0
    for store in stores(channel_map, world):
        plan = store._plan(selection, WEIGHTS)
        low, high = plan.segments[store.ranks.rank]
        assert low == end
        end = high
        gather(store.arrays[WEIGHTS], plan.moves, assembled)
    assert end == expected.numel()
    assert torch.equal(assembled, expected)


@given(st.data(), channel_maps(), st.integers(1, 4))
def test_scatter_of_what_was_gathered_changes_nothing_and_other_entries_are_never_written(
    data: st.DataObject, channel_map: ChannelMap, world: int
) -> None:
    selection = Selection(channel_map, data.draw(masks(channel_map)))
    values = narrow(channel_map, selection)
    for store, untouched in zip(stores(channel_map, world), stores(channel_map, world), strict=True):
        moves = store._plan(selection, WEIGHTS).moves
        scatter(store.arrays[WEIGHTS], moves, values)
        assert torch.equal(store.arrays[WEIGHTS], untouched.arrays[WEIGHTS])
        scatter(store.arrays[WEIGHTS], moves, torch.full_like(values, 7.0))
        changed = store.arrays[WEIGHTS] != untouched.arrays[WEIGHTS]
        assert int(changed.sum()) == sum(m.rows.numel() * m.pattern.numel() * m.unit for m in moves)
        assert bool((store.arrays[WEIGHTS][changed] == 7).all())


@given(st.data(), channel_maps())
def test_shared_positions_name_the_same_full_entries(data: st.DataObject, channel_map: ChannelMap) -> None:
    a, b = (Selection(channel_map, data.draw(masks(channel_map))) for _ in range(2))
    names = tuple(channel_map.shapes)
    layout = Layout.of(dict(channel_map.shapes))
    identity = {n: layout.view(torch.arange(layout.size), n) for n in names}
    flat_a, flat_b = (torch.cat([s.take(n, identity[n]).flatten() for n in names]) for s in (a, b))
    in_a, in_b = shared_positions(a, b, names)
    assert torch.equal(flat_a[in_a], flat_b[in_b])
    assert set(flat_a[in_a].tolist()) == set(flat_a.tolist()) & set(flat_b.tolist())


def test_slots_start_at_zero_and_move_with_the_indices_of_the_weights() -> None:
    channel_map = ChannelMap((), {"w": (4, 3), "b": (4,)}, {"w": (None, None), "b": (None,)})
    store = WeightStore(channel_map, ("w",), ("b",), ("momentum_buffer",))
    selection = Selection(channel_map, channel_map.full_mask())
    out = torch.full((12,), torch.nan)
    store.gather(selection, "momentum_buffer", out)
    assert torch.equal(out, torch.zeros(12))
    store.scatter(selection, "momentum_buffer", torch.arange(12.0))
    store.gather(selection, "momentum_buffer", out)
    assert torch.equal(out, torch.arange(12.0))
    buffers = torch.empty(4)
    store.gather(selection, BUFFERS, buffers)
    assert torch.equal(buffers, torch.zeros(4))
    assert store.nbytes == 4 * (12 + 12 + 4)


def test_integer_buffers_are_kept_whole_and_unsliced() -> None:
    channel_map = ChannelMap((), {"w": (2,)}, {"w": (None,)})
    store = WeightStore(channel_map, ("w",), ())
    store.fill([("w", torch.ones(2)), ("steps", torch.tensor(3))])
    assert store.integer_buffers["steps"] == 3
