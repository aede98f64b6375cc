"""A search in cycles keeps its budget, resumes bit for bit, and finds the widths that a known loss wants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine.preparation import prepare
from offload_sparse.policy import width_search
from offload_sparse.policy.config import PolicyConfig, SearchName
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.probe import Comparisons, present_widths
from offload_sparse.policy.width_search import (
    CYCLES,
    PROBE_SHARE,
    WidthSearch,
    build_policy,
    cycles_and_pairs,
)
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, small_map
from tests.support.residual_nets import ResidualNet

NET = SmallNet(widths=(96, 128))  # type: ignore[arg-type]
MAP = small_map(NET)
IMAGES = (torch.empty(1, 2, 6, 6, device="meta"),)
COSTS = CostModel(NET, MAP, IMAGES)
GROUPS = MAP.groups
STEPS = 2000


class ShortCycles(PolicyConfig):
    cycle_steps = 150


def search(budget: str = "flops", total: int = STEPS, **config: object) -> WidthSearch:
    policy = ShortCycles(rho=0.2, budget=budget, **config)  # type: ignore[arg-type]
    return WidthSearch(policy, GROUPS, 5, COSTS, int(0.4 * total), total)


def loss_of(mask: Tensor, wanted: Tensor) -> float:
    """Least, at any one cost, where widths are in a ratio that ``wanted`` decides."""
    return float((wanted / present_widths(mask, GROUPS)).sum())


def cycle(found: WidthSearch, wanted: Tensor, noise: float, seed: int = 0) -> None:
    generator, comparisons = torch.Generator().manual_seed(seed), Comparisons(GROUPS)
    rates = found.rates()
    for number in range(found.pairs):
        m, m_ref = found.pair(number, rates)
        error = noise * float(torch.randn((), generator=generator))
        comparisons.add(loss_of(m, wanted) - loss_of(m_ref, wanted) + error, found.mask, m, m_ref)
    found.move(comparisons, torch.rand(MAP.num_atoms, dtype=torch.float64, generator=generator))


def spent(found: WidthSearch, budget: str) -> float:
    """Of a budget of atoms the FLOPs of even widths, which it is worth at the start, are kept."""
    mask = found.mask
    even = float(COSTS.expected_flops(torch.full((len(mask),), 0.2, dtype=torch.float64)))
    return {
        "count": 0.2 * COSTS.flops(mask) / even,
        "params": COSTS.parameters(mask) / COSTS.dense_parameters,
        "flops": COSTS.flops(mask) / COSTS.dense_flops,
    }[budget]


@pytest.mark.parametrize("budget", ["count", "params", "flops"])
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_widths_follow_the_loss_at_the_same_cost(budget: str, group: int) -> None:
    found = search(budget)
    wanted = torch.ones(len(GROUPS), dtype=torch.float64)
    wanted[group] = 30.0
    before = loss_of(found.mask, wanted)
    start = present_widths(found.mask, GROUPS)
    for number in range(CYCLES):
        cycle(found, wanted, noise=0.01, seed=number)
        assert spent(found, budget) <= 0.2 * (1 + 1e-9)
        assert spent(found, budget) >= 0.2 * 0.95
    assert float(present_widths(found.mask, GROUPS)[group]) > float(start[group])
    assert loss_of(found.mask, wanted) < before
    assert COSTS.parameters(found.mask) <= found.size_cap


def test_a_move_stays_within_the_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it is made where all of it does not fit, and none where nothing does."""
    wanted = torch.tensor([1.0, 30.0], dtype=torch.float64)
    found = {}
    for room in (1.4, 1.03, 0.9):
        monkeypatch.setattr(width_search, "MEMORY_ROOM", room)
        moved = search()
        start, widths = COSTS.outputs(moved.mask), present_widths(moved.mask, GROUPS)
        for number in range(CYCLES):
            cycle(moved, wanted, noise=0.01, seed=number)
        assert len(moved.history) == CYCLES
        if room < 1:
            assert torch.equal(present_widths(moved.mask, GROUPS), widths)
            continue
        found[room] = COSTS.outputs(moved.mask) / start
        assert 1 < found[room] <= room
    assert found[1.4] > 1.03


def test_noise_moves_little() -> None:
    found = search()
    start = present_widths(found.mask, GROUPS)
    cycle(found, torch.zeros(len(GROUPS), dtype=torch.float64), noise=1.0)
    ratio = (present_widths(found.mask, GROUPS) / start).log().abs()
    assert float(ratio.max()) < 0.15


def test_the_least_important_leave_and_those_that_were_trained_come_first() -> None:
    found = search()
    found.trained[:] = False
    found.trained |= found.mask
    old = GROUPS[0].start + GROUPS[0].size - 1
    found.trained[old] = True
    importance = torch.arange(MAP.num_atoms, 0, -1, dtype=torch.float64)
    before = found.mask.clone()
    comparisons = Comparisons(GROUPS)
    slope = torch.full((len(GROUPS),), -1.0, dtype=torch.float64)
    slope[0] = 5.0
    rates = found.rates()
    for number in range(found.pairs):
        m, m_ref = found.pair(number, rates)
        share = (present_widths(m_ref, GROUPS) - present_widths(m, GROUPS)) / present_widths(before, GROUPS)
        comparisons.add(float(slope @ share), before, m, m_ref)
    found.move(comparisons, importance)
    first, second = GROUPS[0], GROUPS[1]
    assert int(found.mask[: first.size].sum()) > int(before[: first.size].sum())
    assert bool(found.mask[old]), "trained before, so it comes before new ones"
    kept, was = found.mask[second.start : second.stop], before[second.start : second.stop]
    assert int(kept.sum()) < int(was.sum())
    assert float(importance[second.start : second.stop][was & ~kept].max()) < float(
        importance[second.start : second.stop][kept].min()
    )


def test_cycles_share_the_search_and_probes_cost_at_most_a_tenth() -> None:
    found = search(total=4000)
    assert found.boundaries == [400, 800, 1200, 1600]
    assert found.cycle(0, 4000) == (0, 400)
    assert found.cycle(400, 4000) == (400, 800)
    assert found.cycle(3999, 4000) == (1600, 4000)
    for total in (30, 100, 300, 1000, 10_000):
        few = search(total=total)
        forwards = 2 * few.pairs * len(few.boundaries)
        assert forwards <= PROBE_SHARE * 3 * total
        assert not few.boundaries or few.pairs > len(GROUPS) + 1
    assert search(total=10).boundaries == []


def test_one_group_has_none_to_trade_with() -> None:
    cycles = [cycles_and_pairs(groups, 1600, 6400)[0] for groups in (1, 2)]
    assert cycles == [0, 2]


def test_without_steps_to_search_in_it_is_one_even_mask() -> None:
    fixed = WidthSearch(PolicyConfig(rho=0.2), GROUPS, 0, COSTS)
    assert fixed.boundaries == []
    assert all(torch.equal(mask, fixed.mask) for mask in (*fixed.sample(3), *fixed.candidates(4)))
    assert fixed.size_cap == COSTS.parameters(fixed.mask)
    assert "probes" not in fixed.report()


def test_a_resumed_search_goes_on_bit_for_bit() -> None:
    wanted = torch.linspace(1, 9, len(GROUPS), dtype=torch.float64)
    straight, first, resumed = search(), search(), search()
    for number in range(3):
        cycle(straight, wanted, 0.05, number)
    cycle(first, wanted, 0.05, 0)
    state = first.state_dict()
    cycle(first, wanted, 0.05, 9)
    resumed.load_state_dict(state)
    for number in (1, 2):
        cycle(resumed, wanted, 0.05, number)
    assert torch.equal(straight.mask, resumed.mask)
    assert straight.report() == resumed.report()
    assert len(straight.report()["probes"]) == 3
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert shapes == {name: tensor.shape for name, tensor in straight.state_dict().items()}


def test_the_search_of_a_run_that_was_shorter_at_first_goes_on() -> None:
    wanted = torch.linspace(1, 9, len(GROUPS), dtype=torch.float64)
    short, long = search(total=500), search(total=4000)
    assert len(short.boundaries) < len(long.boundaries)
    long.load_state_dict(short.state_dict())
    for number in range(len(long.boundaries)):
        cycle(long, wanted, 0.05, number)
    assert len(long.report()["probes"]) == len(long.boundaries)


def test_a_state_of_another_search_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"policy\.search probe"):
        search().load_state_dict({"s": torch.zeros(3)})


def untold(found: WidthSearch) -> None:
    """A cycle whose probe tells nothing."""
    comparisons, rates = Comparisons(found.groups), found.rates()
    for number in range(found.pairs):
        m, m_ref = found.pair(number, rates)
        comparisons.add(0.0, found.mask, m, m_ref)
    found.move(comparisons, torch.rand(len(found.mask), dtype=torch.float64))


def test_a_search_begins_with_the_widths_that_it_is_given() -> None:
    def build(search: SearchName) -> MaskPolicy | WidthSearch:
        config = ShortCycles(rho=0.2, budget="flops", search=search)
        return build_policy(config, MAP, 5, COSTS, 800, STEPS, widths="40, 10")

    kept, found = build("none"), build("probe")
    assert isinstance(kept, WidthSearch)
    assert isinstance(found, WidthSearch)
    assert kept.stays
    assert present_widths(kept.mask, GROUPS).tolist() == [40, 10]
    for _ in range(2):
        widths = present_widths(found.mask, GROUPS)
        assert spent(found, "flops") == pytest.approx(0.2, rel=0.05), "they are scaled to the budget"
        assert float(widths[0] / widths[1]) == pytest.approx(4, rel=0.1)
        untold(found)
    for search in ("sampled", "forward"):
        with pytest.raises(ValueError, match=r"leave out static\.widths"):
            build(search)


def test_a_search_moves_on_from_the_widths_that_there_are() -> None:
    """Of few wide atoms a mask can be far from the even widths that it was rounded from."""
    found = search("count")
    found.mask[GROUPS[0].start : GROUPS[0].start + 60] = True  # as rounding might have left it
    untold(found)
    widths = present_widths(found.mask, GROUPS)
    assert spent(found, "count") <= 0.2 * (1 + 1e-9)
    assert float(widths[0] / widths[1]) == pytest.approx(60 / round(0.2 * 128), rel=0.1)


@pytest.mark.parametrize(
    ("net", "rho"),
    [
        (SmallNet(widths=(2, 128)), 0.1),  # type: ignore[arg-type]
        (ResidualNet(width=16, hidden=16), 0.25),
        (NET, 1.0),
    ],
    ids=["a group of few atoms", "filters that share a stream", "all of it"],
)
def test_a_budget_of_atoms_keeps_its_network_where_a_probe_tells_nothing(net: nn.Module, rho: float) -> None:
    """Members of a family that is budgeted by the same numbers, too."""
    prepared = prepare(net, IMAGES, "filter", verify=False)
    costs = CostModel(prepared.meta_model, prepared.channel_map, IMAGES)
    policy = ShortCycles(rho=rho, search="probe", budgets=[rho])
    found = WidthSearch(policy, prepared.channel_map.groups, 5, costs, 800, STEPS)
    before = found.mask
    untold(found)
    assert all(map(partial(torch.equal, before), (found.mask, *found.family())))


@pytest.mark.parametrize(
    ("measure", "limit"), [(COSTS.parameters, "size_cap"), (COSTS.outputs, "_most_of_family")]
)
def test_a_family_stays_within_the_room_that_is_planned(
    measure: Callable[[Tensor], float], limit: str
) -> None:
    """Its largest member is what the final phase holds; the others stay parts of it."""
    found = search(budgets=[0.1, 0.3], search="probe")
    even = found.family()[-1]
    assert found._most_of_family == width_search.MEMORY_ROOM * COSTS.outputs(even)
    for number in range(CYCLES):
        cycle(found, torch.tensor([1.0, 30.0]).double(), noise=0.01, seed=number)
    free = found.family()[-1]
    room = (measure(even) + measure(free)) / 2
    assert measure(free) > room
    setattr(found, limit, room)
    small, large = found.family()
    assert measure(large) <= room
    assert bool((large >= small).all())
    assert bool((small != large).any())


@pytest.mark.parametrize("budget", ["count", "params", "flops"])
def test_a_family_has_the_widths_that_were_found_at_every_budget(budget: str) -> None:
    shares = [0.6, 0.1, 0.3]
    found = search(budget, budgets=shares, search="probe")
    wanted = torch.tensor([1.0, 30.0], dtype=torch.float64)
    cycle(found, wanted, noise=0.01)
    masks = found.family()
    assert torch.equal(found.candidates(1)[0], masks[-1])
    whole = {"count": len(found.mask), "params": COSTS.dense_parameters, "flops": COSTS.dense_flops}[budget]
    cost = {"count": lambda mask: int(mask.sum()), "params": COSTS.parameters, "flops": COSTS.flops}[budget]
    for share, mask in zip(sorted(shares), masks, strict=True):
        assert cost(mask) == pytest.approx(share * whole, rel=0.1)
        widths = present_widths(mask, GROUPS)
        even = present_widths(search(budget).mask, GROUPS)
        assert widths[1] / widths[0] > even[1] / even[0], "what was worth more is wider in all"
    assert all(bool((large >= small).all()) for small, large in pairwise(masks))
    assert COSTS.parameters(masks[-1]) <= found.size_cap
    resumed = search(budget, budgets=shares, search="probe")
    resumed.load_state_dict(found.state_dict())
    assert all(map(torch.equal, resumed.family(), masks))


def test_a_family_of_trained_weights_has_their_most_important_channels() -> None:
    importance = torch.rand(MAP.num_atoms, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = PolicyConfig(rho=0.2, search="none", budgets=[0.1, 0.2])
    found = WidthSearch(policy, GROUPS, 5, COSTS, importance=importance)
    for mask in (found.mask, *found.family()):
        for group in GROUPS:
            inside = slice(group.start, group.stop)
            kept, lost = importance[inside][mask[inside]], importance[inside][~mask[inside]]
            assert float(kept.min()) > float(lost.max())


def test_a_family_stays_when_its_run_is_made_longer() -> None:
    """The search of the short one had no cycle, and has ended."""
    images = (torch.empty(1, 1, 14, 14, device="meta"),)
    net = build_on_meta(partial(build_model, "offload_sparse/vgg_small", in_channels=1, image_size=14))
    channel_map = discover(net, images)
    costs = CostModel(net, channel_map, images)
    policy = ShortCycles(rho=0.1, search="probe", budgets=[0.1, 0.2, 0.4])
    short, long = (
        WidthSearch(policy, channel_map.groups, 5, costs, total // 2, total) for total in (100, STEPS)
    )
    assert not short.boundaries
    assert long.boundaries
    long.load_state_dict(short.state_dict())
    assert all(map(torch.equal, short.family(), long.family()))
