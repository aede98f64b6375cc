"""MaskPolicy keeps its budget and cap, is deterministic, and takes the steps of a hand-written loop."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.engine.config import RoundConfig, check_combination
from offload_sparse.engine.preparation import prepare
from offload_sparse.policy.budget import project
from offload_sparse.policy.config import PolicyConfig, SearchName
from offload_sparse.policy.estimators import Comparison, precondition, rloo
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.width_search import build_policy
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, chain_of, small_map
from tests.support.constants import configured

GROUPS, COSTS = chain_of(8, 16, 3)
C = 27
IMAGES = (torch.empty(1, 2, 6, 6, device="meta"),)


def policy(seed: int = 0, **config: object) -> MaskPolicy:
    settings = configured(PolicyConfig, **(vars(PolicyConfig.paper()) | config))
    return MaskPolicy(settings, GROUPS, seed, COSTS)


def train(learner: MaskPolicy, rounds: range) -> None:
    """Updates with losses that depend on the masks: the first group is worth keeping."""
    for round in rounds:
        m1, m2 = learner.sample(round)
        learner.update([math.sin(round) - float(m1[:8].sum())], [-float(m2[:8].sum())], m1, m2, round)


configurations = st.fixed_dictionaries(
    {
        "rho": st.sampled_from([0.12, 0.25, 0.5, 0.9, 0.999, 1.0]),
        "estimator": st.sampled_from(["vr_pge", "rloo"]),
        "optimizer": st.sampled_from(["adam", "sgd"]),
        "lr": st.sampled_from([0.012, 0.5]),
        "hard_cap": st.sampled_from([1.0, 1.1, 1.25]),
    }
)


@settings(max_examples=60, deadline=None)
@given(configurations, st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.integers(0, 1000))
def test_budget_bounds_cap_and_widths_hold_after_every_update(
    config: dict[str, object], differences: list[float], seed: int
) -> None:
    learner = policy(seed, **config)
    rho, floor = learner.config.rho, learner.config.floor
    for round, difference in enumerate(differences):
        m1, m2 = learner.sample(round)
        for mask in (m1, m2):
            assert int(mask.sum()) <= min(C, math.ceil(learner.config.hard_cap * rho * C - 1e-9))
            for group in GROUPS:
                assert bool(mask[group.start : group.stop].any())
        learner.update([difference], [0.0], m1, m2)
        assert float(learner.s.sum()) <= rho * C + 1e-9
        assert rho == 1 or floor <= float(learner.s.min()) <= float(learner.s.max()) <= 1 - floor


@pytest.mark.parametrize("rho", [0.12, 0.25, 0.7])
def test_s_starts_at_rho_and_spends_the_whole_budget(rho: float) -> None:
    learner = policy(rho=rho)
    assert learner.s.dtype == torch.float64
    assert torch.equal(learner.s, torch.full((C,), rho, dtype=torch.float64))
    assert float(learner.s.sum()) == pytest.approx(rho * C)


@pytest.mark.parametrize("rho", [0.25, 0.3, 0.7])
def test_a_start_at_a_cut_keeps_the_share_of_every_group(rho: float) -> None:
    """Of those, too, that are not cut to a whole number of atoms; the order is that of importance."""
    (groups, costs), generator = chain_of(1, 2, 8, 30), torch.Generator().manual_seed(0)
    importance = torch.rand(41, dtype=torch.float64, generator=generator)
    learner = MaskPolicy(PolicyConfig.paper(rho=rho), groups, 0, costs, importance)
    for group in groups:
        s, worth = (values[group.start : group.stop] for values in (learner.s, importance))
        assert float(s.mean()) == pytest.approx(rho, abs=1e-12)
        assert torch.equal(s.argsort(), worth.argsort())


def test_masks_are_a_function_of_seed_and_round_whatever_was_drawn_before() -> None:
    forward, backward = policy(seed=5), policy(seed=5)
    there = {round: forward.sample(round) for round in range(6)}
    back = {round: backward.sample(round) for round in reversed(range(6))}
    backward.candidates(3)
    for round in range(6):
        for first, second, third in zip(there[round], back[round], backward.sample(round), strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)
    assert not torch.equal(policy(seed=6).sample(0)[0], there[0][0])
    assert not torch.equal(*there[0])


def test_the_mean_of_the_drawn_masks_is_s() -> None:
    learner = policy(rho=0.5, hard_cap=2.0)
    train(learner, range(30))
    rounds = 4000
    total = sum((m1.to(torch.float64) + m2) / 2 for m1, m2 in map(learner.sample, range(rounds))) / rounds
    wide = slice(0, 24)  # the last group has 3 atoms and is sometimes filled
    deviation = (learner.s * (1 - learner.s) / (2 * rounds)).sqrt()
    assert torch.all((total - learner.s).abs()[wide] <= 5 * deviation[wide])


def adam_step(s: Tensor, g: Tensor, first: Tensor, second: Tensor, step: int, lr: float) -> Tensor:
    first.mul_(0.9).add_(0.1 * g)
    second.mul_(0.999).add_(0.001 * g * g)
    return s - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def sgd_step(s: Tensor, g: Tensor, first: Tensor, second: Tensor, step: int, lr: float) -> Tensor:
    first.mul_(0.9).add_(g)
    return s - lr * first


@pytest.mark.parametrize(("optimizer", "reference"), [("adam", adam_step), ("sgd", sgd_step)])
def test_updates_equal_a_hand_written_loop(optimizer: str, reference: object) -> None:
    learner = policy(optimizer=optimizer, lr=0.02)
    s = torch.full((C,), 0.25, dtype=torch.float64)
    first, second = torch.zeros_like(s), torch.zeros_like(s)
    for step in range(1, 6):
        m1, m2 = learner.sample(step)
        difference = 0.3 * math.cos(step)
        g = precondition(rloo(Comparison(difference, 0.0, m1, m2, s)), s)
        z = reference(s, g, first, second, step, 0.02)  # type: ignore[operator]
        s = torch.from_numpy(project(z.numpy(), 0.25 * C, 0.005, 0.995))
        learner.update([difference], [0.0], m1, m2)
        torch.testing.assert_close(learner.s, s, rtol=0, atol=1e-13)


@pytest.mark.parametrize("estimator", ["vr_pge", "rloo"])
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.012), ("sgd", 0.003)])
def test_atoms_that_lower_the_loss_become_more_probable(estimator: str, optimizer: str, lr: float) -> None:
    learner = policy(rho=0.4, estimator=estimator, optimizer=optimizer, lr=lr)
    for round in range(400):
        m1, m2 = learner.sample(round)
        learner.update([-float(m1[:8].sum())], [-float(m2[:8].sum())], m1, m2, round)
    assert float(learner.s[:8].mean()) > 0.7
    assert float(learner.s[8:].mean()) < 0.4


def test_a_remaining_ratio_of_one_keeps_everything_and_learns_nothing() -> None:
    learner = policy(rho=1.0)
    assert learner.trivial
    m1, m2 = learner.sample(0)
    assert bool(m1.all())
    assert bool(m2.all())
    learner.update([3.0], [0.0], m1, m2)
    assert torch.equal(learner.s, torch.ones(C, dtype=torch.float64))
    assert learner.entropy == 0
    assert learner.cap == C
    assert [bool(mask.all()) for mask in learner.candidates(4)] == [True]


def test_candidates_have_the_expected_widths_and_do_not_repeat() -> None:
    learner = policy(rho=0.4)
    train(learner, range(200))
    masks = learner.candidates(8)
    assert 2 <= len(masks) <= 9
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    for mask in masks:
        assert int(mask.sum()) == int(0.4 * C)
        for group in GROUPS:
            width = int(mask[group.start : group.stop].sum())
            expected = float(learner.s[group.start : group.stop].sum())
            assert abs(width - expected) <= 1.5
    for group in GROUPS:  # the first takes the most probable atoms of each group
        inside, s = masks[0][group.start : group.stop], learner.s[group.start : group.stop]
        assert bool(inside.all()) or float(s[inside].min()) >= float(s[~inside].max())
    assert all(torch.equal(a, b) for a, b in zip(masks, learner.candidates(8), strict=True))


def test_candidates_do_not_reuse_the_masks_of_the_rounds() -> None:
    learner = policy(rho=0.4)
    seen = {tuple(mask.tolist()) for round in range(8) for mask in learner.sample(round)}
    assert all(tuple(mask.tolist()) not in seen for mask in learner.candidates(8))


def test_entropy_is_the_mean_in_bits() -> None:
    assert policy(rho=0.5).entropy == pytest.approx(1.0)
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert policy(rho=0.25).entropy == pytest.approx(expected)


def test_the_cap_is_the_rounded_up_share() -> None:
    assert policy(rho=0.5, hard_cap=1.25).cap == math.ceil(1.25 * 13.5)
    assert policy(rho=0.9, hard_cap=2.0).cap == C


def test_a_cap_without_bound_caps_nothing() -> None:
    """Neither atoms nor parameters nor FLOPs."""
    net = SmallNet()
    costs = CostModel(net, small_map(net), IMAGES)
    for budget in ("count", "flops"):
        config = PolicyConfig(hard_cap=math.inf, budget=budget)  # type: ignore[arg-type]
        learner = MaskPolicy(config, small_map(net).groups, 0, costs)
        assert (learner.cap, learner.size_cap) == (learner.num_atoms, costs.dense_parameters)


def test_caps_know_that_filters_of_one_stream_keep_different_channels() -> None:
    """Their masks leave more of a stream than even ones do; few are cut, and the final ones not at all."""
    images = (torch.empty(1, 3, 8, 8, device="meta"),)
    resnet = partial(build_model, "offload_sparse/resnet20_cifar", 10, 3, 8)
    net = prepare(resnet, images, "filter", verify=False)
    costs = CostModel(net.meta_model, net.channel_map, images)
    learner = MaskPolicy(PolicyConfig.paper(rho=0.125), net.channel_map.groups, 0, costs)
    drawn = sum(float(learner.sample(round)[0].sum()) for round in range(50)) / 50
    assert drawn == pytest.approx(98, rel=0.04)
    assert {int(mask.sum()) for mask in learner.candidates(8)} == {98}


def test_a_rate_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy\.lr is inf"):
        PolicyConfig(lr=math.inf)


@pytest.mark.parametrize("difference", [float("nan"), float("inf")])
def test_a_loss_difference_that_is_not_finite_is_an_error(difference: float) -> None:
    learner = policy()
    with pytest.raises(ValueError, match="finite"):
        learner.update([difference], [0.0], *learner.sample(0))


@pytest.mark.parametrize("search", ["sampled", "none"])
def test_a_model_without_groups_is_an_error(search: SearchName) -> None:
    net = SmallNet()
    costs = CostModel(net, small_map(net), IMAGES)
    with pytest.raises(ValueError, match="no groups"):
        build_policy(PolicyConfig(search=search), ChannelMap((), {}, {}), 0, costs, 10, 10)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "adam"},
        {"optimizer": "sgd"},
        {"parametrisation": "group"},
        {"estimator": "disarm_cv"},
        {"sampler": "persistent", "estimator": "vr_pge"},
        {"sampler": "fixed_width", "estimator": "vr_pge"},
    ],
)
@pytest.mark.parametrize("saved_at", [0, 1, 10])
def test_a_resumed_policy_continues_bit_for_bit(config: dict[str, object], saved_at: int) -> None:
    straight, first, resumed = policy(**config), policy(**config), policy(**config)
    train(straight, range(20))
    train(first, range(saved_at))
    state = first.state_dict()
    train(first, range(saved_at, saved_at + 3))  # the saved state is a copy
    train(resumed, range(100, 104))  # loading replaces whatever was there
    resumed.load_state_dict(state)
    train(resumed, range(saved_at, 20))
    assert torch.equal(straight.s, resumed.s)
    left, right = straight.state_dict(), resumed.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_state_of_another_model_or_optimizer_is_an_error() -> None:
    learner = policy()
    groups, costs = chain_of(8)
    other = MaskPolicy(PolicyConfig(), groups, 0, costs)
    with pytest.raises(ValueError, match="27 atoms"):
        learner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"policy\.optimizer"):
        learner.load_state_dict(policy(optimizer="sgd").state_dict())


# --- samplers, budgets, schedules ---


def test_fixed_widths_never_change() -> None:
    learner = policy(rho=0.25, sampler="fixed_width", lr=0.05)
    widths = [2, 3, 1]
    for round in range(50):
        for mask in learner.sample(round):
            assert [int(mask[g.start : g.stop].sum()) for g in GROUPS] == widths
        train(learner, range(round, round + 1))
    assert float((learner.s - 0.25).abs().max()) > 0.1, "s has moved"
    for mask in learner.candidates(4):
        assert [int(mask[g.start : g.stop].sum()) for g in GROUPS] == widths
    for group, width in zip(GROUPS, widths, strict=True):
        assert float(learner.s[group.start : group.stop].sum()) <= width + 1e-9


def test_persistent_masks_resemble_each_other() -> None:
    """Candidates of the next round start where those of the last one are."""
    learner = policy(rho=0.5, sampler="persistent", refresh=0.1)
    first, second = learner.sample(7)
    assert int((first ^ second).sum()) <= int(learner._sampler.redrawn(7).sum())
    assert 0 < int(learner._sampler.redrawn(7).sum()) <= 8
    assert torch.equal(second, learner.sample(8)[0])
    independent = policy(rho=0.5)
    assert int((independent.sample(7)[0] ^ independent.sample(8)[0]).sum()) > 5
    candidates = learner.candidates(3, round=7)
    assert any(int((mask ^ first).sum()) <= 4 for mask in candidates)


def test_atoms_that_are_not_redrawn_are_not_moved() -> None:
    learner = policy(rho=0.5, sampler="persistent", refresh=0.1, optimizer="sgd", hard_cap=2)
    before = learner.s.clone()
    round = 3
    m1, m2 = learner.sample(round)
    learner.update([-1.0], [0.0], m1, ~m2, round)  # masks that differ everywhere
    redrawn = learner._sampler.redrawn(round)
    moved = (learner.s - before).abs() > 0.1
    assert bool(redrawn.any())
    assert not bool((moved & ~redrawn).any())


def test_antithetic_masks_of_small_probabilities_share_no_atom() -> None:
    learner = policy(rho=0.3, estimator="disarm_cv", hard_cap=3.0)
    for round in range(20):
        m1, m2 = learner.sample(round)
        assert not bool((m1 & m2)[8:24].any())  # narrower groups may have been filled


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"sampler": "persistent", "estimator": "disarm_cv"}, "policy.sampler to bernoulli"),
        ({"sampler": "fixed_width", "estimator": "disarm_cv"}, "set it to rloo"),
        ({"sampler": "fixed_width", "parametrisation": "group"}, "policy.parametrisation to atom"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(config: dict[str, object], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        PolicyConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_", "compiled", "sampler", "estimator", "parametrisation"),
    [
        ({}, False, "persistent", "rloo", "group"),
        ({}, True, "fixed_width", "rloo", "atom"),
        ({"sampler": "bernoulli"}, False, "bernoulli", "disarm_cv", "group"),
        ({"estimator": "disarm_cv"}, False, "bernoulli", "disarm_cv", "group"),
        ({"estimator": "vr_pge"}, False, "persistent", "vr_pge", "group"),
        ({"sampler": "bernoulli"}, True, "bernoulli", "disarm_cv", "group"),
        ({"parametrisation": "atom"}, False, "persistent", "rloo", "atom"),
        ({"search": "forward"}, False, "fixed_width", "rloo", "atom"),
        ({"search": "forward", "parametrisation": "group"}, False, "persistent", "rloo", "group"),
    ],
)
def test_what_is_left_open_is_chosen_to_go_together(
    given_: dict[str, str], compiled: bool, sampler: str, estimator: str, parametrisation: str
) -> None:
    chosen = PolicyConfig(**given_).resolved(compiled)  # type: ignore[arg-type]
    assert (chosen.sampler, chosen.estimator, chosen.parametrisation) == (sampler, estimator, parametrisation)
    assert chosen.resolved(compiled) == chosen


def test_references_of_ranks_are_learned_from_by_leave_one_out_only() -> None:
    rounds = RoundConfig(reference="every_step", subnets="references")
    check_combination(PolicyConfig(estimator="rloo"), rounds)
    with pytest.raises(ValueError, match=r"set policy\.estimator to rloo"):
        check_combination(PolicyConfig(estimator="vr_pge"), rounds)


def test_a_report_has_the_fields_of_a_line_of_metrics() -> None:
    learner = policy()
    train(learner, range(5))
    report = learner.report()
    assert report.keys() == {
        "entropy",
        "deaths",
        "revivals",
        "group_keep",
        "mask_overlap",
        "loss_difference_mean",
        "loss_difference_std",
    }
    assert report["group_keep"].keys() == {group.name for group in GROUPS}
    assert 0 < report["mask_overlap"] < 1


@pytest.mark.parametrize("sampler", ["persistent", "bernoulli", "fixed_width"])
@pytest.mark.parametrize("estimator", ["vr_pge", "auto"])
def test_the_steps_of_a_round_taken_at_once_are_those_taken_one_by_one(estimator: str, sampler: str) -> None:
    """To the bit, with everything that is saved."""
    at_once, one_by_one = (
        policy(estimator=estimator, sampler=sampler, parametrisation="auto", lr=0.3) for _ in range(2)
    )
    for round in range(4):
        m1, m2 = at_once.sample(round)
        generator = torch.Generator().manual_seed(round)
        losses = torch.randn(2, 7, generator=generator, dtype=torch.float64).tolist()
        at_once.update(*losses, m1, m2, round)
        for loss, other in zip(*losses, strict=True):
            one_by_one.update([loss], [other], m1, m2, round)
    found, expected = (learner.state_dict() for learner in (at_once, one_by_one))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(at_once.s, policy(sampler=sampler, parametrisation="auto").s)
