"""The store: what a rank's rows are, and that gather and scatter move exactly the kept entries."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Layout, Selection, open_grid
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import (
    Narrow,
    fetch_plan,
    fetch_plan_per_rank,
    return_plan,
    shared_plan,
)
from offload_sparse.store.copy.regions import Regions
from offload_sparse.store.copy.tables import DeviceTables
from offload_sparse.store.partition import Partition, row_shape
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore
from tests.support.channel_maps import channel_maps, masks


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
def test_every_row_has_exactly_one_owner(
    channel_map: ChannelMap, world_size: int
) -> None:
    """Each rank owns runs of the full buffer."""
    partition = Partition(Layout.of(dict(channel_map.shapes)), world_size)
    for name, shape in channel_map.shapes.items():
        ranges = [partition.rows(name, rank) for rank in range(world_size)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == row_shape(shape)[0]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    longest = max(row_shape(shape)[1] for shape in channel_map.shapes.values())
    for rank in range(world_size):
        assert abs(partition.shard(rank).size - partition.layout.size / world_size) <= longest + 1


def filled(channel_map: ChannelMap, world: int, target: Narrow, holders: list[Narrow]) -> Tensor:
    """The narrow buffer of ``target`` as all ranks together make it, their exchange done by hand."""
    found = torch.full((target.layout.size,), torch.nan)
    group = stores(channel_map, world)
    plans = [fetch_plan(s.partitions[WEIGHTS], s.ranks.rank, target, holders) for s in group]
    for holder, plan in plans[0].carried.items():
        copy_blocks(plan, [(narrow(channel_map, holders[holder].selection), found)])
    if world == 1:
        group[0].fetch((plans[0], [(WEIGHTS, found)]))
        return found
    for exchanges in zip(*(plan.exchanges for plan in plans), strict=True):
        wire = []
        for store, exchange in zip(group, exchanges, strict=True):
            assert exchange.received == exchanges[0].received, "every rank divides the wire alike"
            own = torch.full((exchange.received[store.ranks.rank],), torch.nan)
            copy_blocks(exchange.packs[0], [(store.arrays[WEIGHTS], own)])
            wire.append(own)
        copy_blocks(exchanges[0].unpack, [(torch.cat(wire), found)])
    return found


@given(st.data(), channel_maps(), st.integers(1, 4), st.integers(0, 3))
def test_entries_carried_and_fetched_are_the_narrow_buffer(
    data: st.DataObject, channel_map: ChannelMap, world: int, holders: int
) -> None:
    """However many other subnets hold parts of it, and however many ranks share the store."""
    names = tuple(channel_map.shapes)
    target, *others = (
        Narrow(Selection(channel_map, data.draw(masks(channel_map))), names) for _ in range(1 + holders)
    )
    expected = narrow(channel_map, target.selection)
    assert torch.equal(filled(channel_map, world, target, others), expected)


@given(st.data(), channel_maps(), st.integers(1, 3))
def test_an_entry_is_fetched_only_if_no_subnet_holds_it(
    data: st.DataObject, channel_map: ChannelMap, world: int
) -> None:
    names = tuple(channel_map.shapes)
    target, a, b = (Narrow(Selection(channel_map, data.draw(masks(channel_map))), names) for _ in range(3))
    full = Layout.of(dict(channel_map.shapes))
    numbers = {n: full.view(torch.arange(full.size), n) for n in names}
    kept_t, kept_a, kept_b = (
        {int(i) for n in names for i in s.selection.take(n, numbers[n]).flatten()} for s in (target, a, b)
    )
    partition = Partition(full, world)
    plans = [fetch_plan(partition, rank, target, [a, b]) for rank in range(world)]
    assert sum(plan.own_entries for plan in plans) == len(kept_t - kept_a - kept_b)
    carried = plans[0].carried
    assert sum(plan.entries for plan in carried.values()) == len(kept_t & (kept_a | kept_b))
    shared = [shared_plan(target, a, (partition, rank)).entries for rank in range(world)]
    assert sum(shared) == len(kept_t & kept_a)
    regions = Regions(target.selection, [a.selection], wanted=[None])
    leaving = [return_plan(partition, rank, target, regions).entries for rank in range(world)]
    assert sum(leaving) == len(kept_t - kept_a)


@given(st.data(), channel_maps(), st.integers(2, 4), st.integers(0, 2))
def test_every_rank_is_sent_a_subnet_of_its_own(
    data: st.DataObject, channel_map: ChannelMap, world: int, holders: int
) -> None:
    names = tuple(channel_map.shapes)
    selections = [Selection(channel_map, data.draw(masks(channel_map))) for _ in range(world + holders)]
    drawn = [Narrow(selection, names) for selection in selections]
    targets, held = drawn[:world], drawn[world:]
    group = stores(channel_map, world)
    plans = [fetch_plan_per_rank(s.partitions[WEIGHTS], s.ranks.rank, targets, held) for s in group]
    for rank, (target, plan) in enumerate(zip(targets, plans, strict=True)):
        (exchange,) = plan.exchanges
        wire = [torch.full((entries,), torch.nan) for entries in exchange.received]
        for store, of_owner, own in zip(group, plans, wire, strict=True):
            copy_blocks(of_owner.exchanges[0].packs[rank], [(store.arrays[WEIGHTS], own)])
        found = torch.full((target.layout.size,), torch.nan)
        copy_blocks(exchange.unpack, [(torch.cat(wire), found)])
        for holder, carried in plan.carried.items():
            copy_blocks(carried, [(narrow(channel_map, held[holder].selection), found)])
        assert torch.equal(found, narrow(channel_map, target.selection))


@given(st.data(), channel_maps())
def test_plans_of_the_same_regions_look_up_the_same_numbers(
    data: st.DataObject, channel_map: ChannelMap
) -> None:
    """Whichever tensors they are of: a device is sent these numbers once."""
    first, second = (Selection(channel_map, data.draw(masks(channel_map))) for _ in range(2))
    regions, names = Regions(first, [second]), tuple(channel_map.shapes)
    plans = []
    for some in (names[::2], names[1::2]):
        target, holder = Narrow(first, some), Narrow(second, some)
        partition = Partition(Layout.of({name: channel_map.shapes[name] for name in some}), 1)
        plan = fetch_plan(partition, 0, target, [holder], regions)
        plans += [p for p in (plan.fetched, *plan.carried.values()) if p is not None and p.entries]
    tables = DeviceTables.of(plans, torch.device("cpu"), 64) if plans else []
    assert len({found.indices.data_ptr() for found in tables}) == (1 if plans else 0)
    assert sum(len(found.blocks) for found in tables) == sum(len(plan.blocks) for plan in plans)


@given(st.data(), channel_maps(), st.integers(1, 4))
def test_a_scatter_of_what_was_gathered_changes_nothing(
    data: st.DataObject, channel_map: ChannelMap, world: int
) -> None:
    """Other entries are never written."""
    selection = Selection(channel_map, data.draw(masks(channel_map)))
    values = narrow(channel_map, selection)
    full = stores(channel_map, 1)[0].partitions[WEIGHTS].layout
    whole = torch.cat([t.flatten() for t in full_tensors(channel_map).values()])
    inside = torch.zeros(full.size, dtype=torch.bool)
    for name in full.shapes:
        grid = open_grid(selection.kept[name], full.shapes[name]) if full.shapes[name] else ...
        full.view(inside, name)[grid] = True
    position = 0
    for store in stores(channel_map, world):
        before = store.arrays[WEIGHTS].clone()
        store.scatter(selection, WEIGHTS, values)
        assert torch.equal(store.arrays[WEIGHTS], before)
        store.scatter(selection, WEIGHTS, torch.full_like(values, 7.0))
        for name in full.shapes:
            low, high = store.partitions[WEIGHTS].rows(name, store.ranks.rank)
            own = store.own_rows(name)
            mask = full.view(inside, name)[low:high] if full.shapes[name] else full.view(inside, name)
            old = full.view(whole, name)[low:high] if full.shapes[name] else full.view(whole, name)
            expected = torch.where(mask, torch.full_like(old, 7.0), old)
            assert torch.equal(own.reshape(-1), expected.reshape(-1)[: own.numel()])
        position += before.numel()
    assert position == full.size


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


def test_a_rank_is_ready_to_receive_before_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the word that it is waits behind what it sends, and a link carries one direction at a time."""
    posted: list[tuple[object, int]] = []
    monkeypatch.setattr(dist, "P2POp", lambda way, tensor, peer, group: (way, peer))
    monkeypatch.setattr(dist, "batch_isend_irecv", posted.extend)
    some, none = torch.ones(2), torch.ones(0)
    Ranks(1, 4, first=4).swap(None, [some, some, none, some], [some, some, some, none])
    assert posted == [(dist.irecv, 4), (dist.irecv, 6), (dist.isend, 4), (dist.isend, 7)]


def test_a_store_per_node_is_refused_where_nodes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, whatever its own node has: groups that ranks see differently never come about."""
    per_node = [4, 4, 4, 4, 2, 2, 2, 2]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(per_node))
    everyones = slice(None), per_node
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(*everyones))
    for rank, size in enumerate(per_node):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
        with pytest.raises(ValueError, match=r"the nodes have 2 or 4 of 8 ranks; set store\.shard to world"):
            Ranks.current(per_node=True)
