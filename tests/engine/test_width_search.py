"""A search by probes on a session: it moves widths, keeps what it knows, and resumes bit for bit."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.engine.config import RoundConfig, check_combination
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.probing import _Thinned, run_probe
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import MethodState, restore_session, session_state
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.probe import present_widths
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.store.weight_store import WEIGHTS, Ranks
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, small_map
from tests.support.ranks import run_ranks
from tests.support.sessions import arrays, assert_same, batches, loss_of, make_session, own_part, stored

STEPS = 150


class ShortCycles(PolicyConfig):
    cycle_steps = 10


POLICY = ShortCycles(rho=0.3, budget="flops", search="probe")


def net() -> nn.Module:
    torch.manual_seed(4)
    return SmallNet(widths=(24, 32)).double()  # type: ignore[arg-type]


def session_of(policy: PolicyConfig = POLICY, prefetch: bool = True, **options: object) -> SparseOffload:
    rounds = RoundConfig(k=4, freeze_at=0.8, prefetch=prefetch)
    return make_session(net(), policy, rounds, STEPS, **options)  # type: ignore[arg-type]


def search_of(session: SparseOffload) -> WidthSearch:
    assert isinstance(session.policy, WidthSearch)
    return session.policy


def test_widths_move_at_the_ends_of_cycles_only_and_the_budget_is_kept() -> None:
    session = session_of()
    search = search_of(session)
    assert len(search.boundaries) >= 2
    assert search.boundaries[-1] == session.freeze_step
    masks, moved = [], set()
    for step, batch in enumerate(batches(STEPS)):
        session.step(loss_of(batch))
        masks.append(search.mask.clone())
        if step and not torch.equal(masks[-1], masks[-2]):
            moved.add(step)
        assert session.cost.flops(search.mask) <= 0.3 * session.cost.dense_flops
        assert session.cost.parameters(search.mask) <= search.size_cap
    assert moved
    assert moved <= set(search.boundaries)
    assert len(search.report()["probes"]) == len(search.boundaries)
    network = session.finalize([batches(1)[0][0]])
    assert torch.equal(network.mask, masks[-1])
    forwards = session.forward_flops
    probes = 2 * search.pairs * len(search.boundaries) * 0.3 * session.cost.dense_flops
    assert probes < 0.12 * forwards


def test_a_session_begins_with_the_widths_of_its_setup() -> None:
    session = session_of(replace(POLICY, search="none"), widths="15 4")
    assert present_widths(search_of(session).mask, session.channel_map.groups).tolist() == [15, 4]
    session.step(loss_of(batches(1)[0]))
    assert session.masks is not None
    assert torch.equal(session.masks[0], search_of(session).mask)


def test_atoms_that_leave_keep_their_weights_and_slots_in_the_store() -> None:
    session = session_of()
    search = search_of(session)
    first = search.boundaries[0]
    data = batches(STEPS)
    for batch in data[:first]:
        session.step(loss_of(batch))
    kinds = (WEIGHTS, "momentum_buffer")
    before = {(k, n): v.clone() for k in kinds for n, v in stored(session, k).items()}
    mask = search.mask.clone()
    for batch in data[first : first + 6]:
        session.step(loss_of(batch))
    after = {(k, n): v for k in kinds for n, v in stored(session, k).items()}
    left, came = mask & ~search.mask, search.mask & ~mask
    assert bool(left.any())
    assert bool(came.any())
    trained = set()
    for (kind, name), value in after.items():
        axis = session.channel_map.axes[name][0]
        if axis is None:
            continue
        same = (value == before[kind, name]).view(len(value), -1).all(1)
        absent = torch.isin(axis, left.nonzero().flatten())
        assert bool(same[absent].all()), "absent channels stand still, with what they have learned"
        if kind == WEIGHTS and bool(absent.any()):
            trained.add(bool((before["momentum_buffer", name][absent] != 0).any()))
    assert trained == {True}


def narrow_net(mask_share: float) -> tuple[nn.Module, ChannelMap, Tensor]:
    module = net()
    channel_map = small_map(module)  # type: ignore[arg-type]
    return module.eval(), channel_map, channel_map.uniform_mask(mask_share)


def test_entries_at_zero_equal_channels_left_out() -> None:
    """The channels that survive are scaled."""
    module, channel_map, mask = narrow_net(0.5)
    present = narrow_module(module, channel_map, mask).eval()
    images, labels = batches(1)[0]

    def closure(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images), labels)

    m = mask.clone()
    kept = mask.nonzero().flatten()
    m[kept[::3]] = False
    selection = Selection(channel_map, mask)
    ones = torch.ones(channel_map.num_atoms, dtype=torch.float64)
    with torch.no_grad():
        expected = closure(narrow_module(module, channel_map, m).eval())
        thinned = _Thinned(present, selection, ones)
        torch.testing.assert_close(thinned.loss(m, closure, Forward()), expected, rtol=1e-12, atol=1e-12)
        # Scaling what all consumers read equals scaling what the (scaled) layers give.
        scaled = _Thinned(present, selection, 1.25 * ones)
        scaled.restore()
        wide = copy.deepcopy(narrow_module(module, channel_map, m)).eval()
        readers = [n for n, p in wide.named_parameters() if p.dim() > 1][1:]
        for name, p in wide.named_parameters():
            if name in readers:
                p.mul_(1.25)
        thinned = _Thinned(present, selection, 1.25 * ones)
        torch.testing.assert_close(thinned.loss(m, closure, Forward()), closure(wide), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "residual", "block"),
    [
        ("offload_sparse/resnet20_cifar", "coupled", 1),
        ("offload_sparse/resnet20_cifar", "filter", 1),
        ("offload_sparse/resnet20_cifar", "internal", 4),
        ("timm/mobilenetv1_100", "coupled", 8),
        ("timm/deit_tiny_patch16_224", "internal", 1),
    ],
)
def test_atoms_left_out_of_any_network_are_absent(name: str, residual: Residual, block: int) -> None:
    size = 224 if "deit" in name else 32
    torch.manual_seed(0)
    module = build_model(name, 10, 3, size, **({"depth": 2} if "deit" in name else {})).double().eval()
    images, labels = torch.randn(1, 3, size, size, dtype=torch.float64), torch.tensor([3])
    channel_map = block_atoms(discover(module, (images,), residual), block)
    mask = channel_map.uniform_mask(0.5)
    m = mask & (torch.rand(len(mask), generator=torch.Generator().manual_seed(1)) < 0.85)
    for group in channel_map.groups:
        m[group.start] = True

    def closure(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images), labels)

    with torch.no_grad():
        expected = closure(narrow_module(module, channel_map, m).eval())
        present = narrow_module(module, channel_map, mask).eval()
        ones = torch.ones(channel_map.num_atoms, dtype=torch.float64)
        found = _Thinned(present, Selection(channel_map, mask), ones).loss(m, closure, Forward())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_probe_leaves_the_subnet_as_it_was_and_finds_what_matters() -> None:
    module, channel_map, mask = narrow_net(0.5)
    present = narrow_module(module, channel_map, mask)
    present.train()
    session = session_of()
    search = search_of(session)
    search.mask = mask
    images, labels = batches(1)[0]
    before = {n: t.clone() for n, t in present.state_dict().items()}
    found, importance = run_probe(
        search,
        present,
        Selection(channel_map, mask),
        [lambda network: F.cross_entropy(network(images), labels)],
        Forward(),
        Ranks(0, 1),
    )
    assert present.training
    assert found.count == search.pairs
    assert_same(present.state_dict(), before)
    assert bool((importance[mask] > 0).all())
    assert not bool(importance[~mask].any())


def result(session: SparseOffload) -> dict[str, Tensor]:
    found = arrays(session) | {f"policy/{n}": v for n, v in session.policy.state_dict().items()}
    found["flops"] = torch.tensor([session.forward_flops, session.steps_done, session.rounds_done])
    session.transfers.close()
    return found


END = 130
"""Both probes are over, and the final phase has begun."""
OFFSETS = (-1, 0, 1, 3)


def own_data() -> list[tuple[Tensor, Tensor]]:
    return [own_part(batch) for batch in batches(END)]


@cache
def straight(prefetch: bool = True) -> dict[str, Tensor]:
    session = session_of(prefetch=prefetch)
    for batch in own_data():
        session.step(loss_of(batch))
    return result(session)


@cache
def first_boundary() -> int:
    return search_of(session_of()).boundaries[0]


@cache
def states(prefetch: bool) -> dict[int, MethodState]:
    """Of one session, around its first probe."""
    session, found = session_of(prefetch=prefetch), {}
    for step, batch in enumerate(own_data()[: first_boundary() + OFFSETS[-1] + 1]):
        if step - first_boundary() in OFFSETS:
            session.records()
            state = session_state(session)
            found[step] = replace(copy.deepcopy(state), meta=json.loads(json.dumps(state.meta)))
        session.step(loss_of(batch))
    session.transfers.close()
    return found


def interrupted(cut: int, prefetch: bool) -> dict[str, Tensor]:
    data, session = own_data(), session_of(prefetch=prefetch)
    restore_session(session, states(prefetch)[cut])
    session.remember(map(loss_of, data[max(0, cut - session.final.selection_batches) : cut]))
    for batch in data[cut:]:
        session.step(loss_of(batch))
    return result(session)


@pytest.mark.parametrize(
    ("prefetch", "offset"),
    [
        *((True, offset) for offset in OFFSETS),
        *(pytest.param(False, o, marks=() if o == 0 else pytest.mark.slow) for o in OFFSETS),
    ],
)
def test_an_interruption_around_a_probe_changes_no_bit(offset: int, prefetch: bool) -> None:
    """The end is that of the run that nothing disturbed."""
    expected, found = straight(prefetch), interrupted(first_boundary() + offset, prefetch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value.nan_to_num(), found[name].nan_to_num()), name


def test_two_ranks_probe_different_pairs_and_move_alike() -> None:
    boundaries = search_of(session_of()).boundaries
    first, second = run_ranks(2, straight)
    alone = straight()
    for name, value in first.items():
        if name.startswith("policy/"):
            assert torch.equal(value.nan_to_num(), second[name].nan_to_num()), name
    history = first["policy/history"]
    assert int((~history[:, 0, 0].isnan()).sum()) == len(boundaries)
    assert not torch.equal(history[0, 1], alone["policy/history"][0, 1]), "other pairs, and twice as many"


def test_a_search_that_has_ended_has_no_more_cycles() -> None:
    """Not in a run that is made longer, either, which would have some at its own steps."""
    session = session_of()
    first, second, *_ = search_of(session).boundaries
    assert session.span(first - 1, STEPS) == (0, first)
    assert session.span(first, STEPS) == (first, second)
    session.freeze()
    session.step(loss_of(batches(1)[0]))
    assert session.span(first, STEPS) == (0, STEPS)


def test_the_last_cycle_begins_where_the_search_has_ended() -> None:
    """In a run that is made longer, too; by a state of an earlier version not before the step that it has."""
    session = session_of()
    last = session.freeze_step
    for batch in batches(last + 3):
        session.step(loss_of(batch))
    assert session.span(last, STEPS) == session.span(STEPS - 1, STEPS) == (last, STEPS)
    session.records()
    for says_when in (True, False):
        state = copy.deepcopy(session_state(session))
        if not says_when:
            state.meta["asked_freeze"] = sys.maxsize
        longer = make_session(net(), POLICY, RoundConfig(k=4, freeze_at=0.8), 2 * STEPS)
        restore_session(longer, state)
        first = last if says_when else last + 3
        for step in (last + 3, longer._planned_freeze, 2 * STEPS - 1):
            assert longer.span(step, 2 * STEPS) == (first, 2 * STEPS)


def test_none_keeps_one_even_mask_and_compares_nothing() -> None:
    session = session_of(PolicyConfig(rho=0.3, search="none"))
    mask = search_of(session).mask
    for batch in batches(12):
        session.step(loss_of(batch))
    assert all(record.compared is None for record in session.records())
    assert torch.equal(session.finalize([batches(1)[0][0]]).mask, mask)
    widths = present_widths(mask, session.channel_map.groups) / torch.tensor([24.0, 32.0])
    assert float(widths.max() - widths.min()) < 0.05


def test_a_search_that_has_no_time_or_no_end_is_refused() -> None:
    with pytest.raises(ValueError, match="set it to auto"):
        check_combination(POLICY.resolved(False), RoundConfig(freeze_at=0.05))
    with pytest.raises(ValueError, match="give total_steps"):
        make_session(net(), POLICY, RoundConfig(freeze_at=0.5), None)  # type: ignore[arg-type]
