"""The engine does what the algorithm says: narrow rounds out of a store equal masked training of the full
weights.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.engine.averaging import EMA
from offload_sparse.engine.config import FinalConfig, OptimConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.weight_store import WEIGHTS
from tests.engine.reference import MaskedTrainer, entry_masks
from tests.support.channel_maps import SmallNet, small_map
from tests.support.constants import configured
from tests.support.sessions import (
    OPTIM,
    POLICIES,
    arrays,
    assert_same,
    batches,
    loss_fn,
    loss_of,
    make_session,
    small_net,
    stored,
)

# Every way of moving weights has one K and one estimator by default: they end with the same bits (below).
WAYS = [
    pytest.param(
        *(estimator, k, *way),
        marks=() if all(way) or (k, estimator) == (2, "vr_pge") else pytest.mark.slow,
    )
    for way in ((True, True), (False, True), (True, False))
    for estimator in ("vr_pge", "rloo")
    for k in (1, 2, 5)
]


@pytest.mark.parametrize("reference", ["every_step", "turns", "round_start"])
@pytest.mark.parametrize(("estimator", "k", "prefetch", "delta"), WAYS)
def test_every_schedule_equals_masked_training_of_the_full_weights(
    reference: str, k: int, estimator: str, prefetch: bool, delta: bool
) -> None:
    """Invariant 5: same trajectory of weights, momentum, statistics and s. K = 1, every_step, vr_pge is
    Algorithm 1.
    """
    policy = PolicyConfig.paper(rho=0.5, estimator=estimator, lr=0.05)  # type: ignore[arg-type]
    rounds = RoundConfig(
        k=k,
        reference=reference,  # type: ignore[arg-type]
        freeze_at=1.0,
        prefetch=prefetch,
        transfer="auto" if delta else "full",
    )
    net = small_net()
    session = make_session(net, policy, rounds)
    reference_run = MaskedTrainer(net, small_map(net), policy, rounds, OPTIM, seed=3)
    data = batches(4 * k)
    for batch in data:
        session.step(loss_of(batch))
    reference_run.run(data)
    for kind, expected in [
        (WEIGHTS, reference_run.weights),
        ("momentum_buffer", reference_run.momentum),
        ("buffers", reference_run.buffers),
    ]:
        for name, value in stored(session, kind).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=f"{kind} {name}")
    torch.testing.assert_close(session.policy.s, reference_run.policy.s, rtol=1e-9, atol=1e-11)
    assert not torch.equal(session.policy.s, torch.full_like(session.policy.s, 0.5)), "s must have moved"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_equals_masked_training_of_the_full_weights(name: str) -> None:
    rounds = RoundConfig(k=2, reference="turns", freeze_at=1.0)
    net, steps = small_net(), 8
    session = make_session(net, POLICIES[name], rounds, steps + 1)
    reference_run = MaskedTrainer(net, small_map(net), POLICIES[name], rounds, OPTIM, seed=3)
    data = batches(steps)
    start = session.policy.s.clone()
    for batch in data:
        session.step(loss_of(batch))
    reference_run.run(data)
    for name, value in stored(session, WEIGHTS).items():
        torch.testing.assert_close(value, reference_run.weights[name], rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(session.policy.s, reference_run.policy.s, rtol=1e-9, atol=1e-11)
    assert not torch.equal(session.policy.s, start), "s must have moved"


@pytest.mark.parametrize("budget", ["count", "params", "flops"])
@pytest.mark.parametrize("sampler", ["bernoulli", "persistent"])
def test_the_network_that_training_ends_with_spends_the_budget(budget: str, sampler: str) -> None:
    """Within 2 %, on a network of which an atom is less than that; s has moved far from where it began."""
    net = SmallNet(widths=(96, 128)).double()
    policy = PolicyConfig.paper(rho=0.3, budget=budget, sampler=sampler, lr=0.05)  # type: ignore[arg-type]
    rounds = RoundConfig(k=2, freeze_at=0.8)
    session = make_session(net, policy, rounds, total=20)
    start = session.policy.s.clone()
    for batch in batches(20):
        session.step(loss_of(batch))
    mask = session.finalize([batches(1)[0][0]]).mask
    assert float((session.policy.s - start).abs().max()) > 0.1
    cost = session.cost
    spent = {
        "count": int(mask.sum()) / len(mask),
        "params": cost.parameters(mask) / cost.dense_parameters,
        "flops": cost.flops(mask) / cost.dense_flops,
    }
    assert spent[budget] == pytest.approx(0.3, rel=0.02)
    assert spent[budget] <= 0.3 * (1 + 1e-9)


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_rho_one_is_plain_training(clip_norm: float) -> None:
    """Invariant 4, one rank: with every channel kept the session is torch.optim.SGD on the network."""
    net = small_net()
    plain = copy.deepcopy(net).train()
    optim = dataclasses.replace(OPTIM, clip_norm=clip_norm)
    session = make_session(net, PolicyConfig.paper(rho=1.0), RoundConfig(k=3), optimizer=optim)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for batch in batches(7):
        session.step(loss_of(batch))
        optimizer.zero_grad()
        loss_fn(plain, batch).backward()
        if clip_norm:
            assert nn.utils.clip_grad_norm_(plain.parameters(), clip_norm) > clip_norm
        optimizer.step()
    network = session.finalize([batches(1)[0][0]])
    for (name, a), (_, b) in zip(network.module.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_absent_channels_stand_still() -> None:
    net = small_net()
    session = make_session(net, PolicyConfig.paper(rho=0.5), RoundConfig(k=4, reference="every_step"))
    before = {n: t.clone() for n, t in stored(session, WEIGHTS).items()}
    mask = session.policy.sample(0)[0]
    for batch in batches(4):
        session.step(loss_of(batch))
    dropped = ~mask[:6]
    assert bool(dropped.any())
    assert torch.equal(stored(session, WEIGHTS)["conv1.weight"][dropped], before["conv1.weight"][dropped])
    assert not torch.equal(
        stored(session, WEIGHTS)["conv1.weight"][~dropped], before["conv1.weight"][~dropped]
    )


class Spoiled:
    """Batches of which one, in the second round, is not a number."""

    def __init__(self) -> None:
        self.batches = batches(9)
        self.batches[4][0].fill_(torch.nan)


@pytest.mark.parametrize("reference", ["every_step", "turns", "round_start"])
def test_a_step_that_is_not_finite_is_named_and_moves_nothing(reference: str) -> None:
    """Neither weights, nor momentum, nor BatchNorm statistics; every later step is as if it had not been."""
    rounds = RoundConfig(k=3, reference=reference)  # type: ignore[arg-type]
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), rounds)
    data = Spoiled().batches
    for batch in data[:4]:
        session.step(loss_of(batch))
    good = arrays(session)
    session.step(loss_of(data[4]))
    assert_same(arrays(session), good)
    with pytest.raises(FloatingPointError, match="step 4 is not finite on rank 0"):
        session.step(loss_of(data[5]))


def test_skipping_goes_on_without_the_batch() -> None:
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=3), on_nonfinite="skip")
    for batch in Spoiled().batches:
        session.step(loss_of(batch))
    records = session.records()
    assert [bool(record.fault) for record in records] == [i == 4 for i in range(9)]
    assert records[4].difference is None
    assert all(bool(array.isfinite().all()) for array in arrays(session).values())


def test_batches_that_were_left_out_are_not_met_again() -> None:
    """By the final mask and by statistics: as in a session that is told of the others alone; in parts."""
    data = batches(8)
    for step in (2, 6):
        data[step][0].fill_(torch.nan)
    parts = [[loss_of((x[:4], y[:4])), loss_of((x[4:], y[4:]))] for x, y in data]
    policy, rounds = PolicyConfig.paper(rho=0.5), RoundConfig(k=2, freeze_at=0.5)
    session, other = (make_session(small_net(), policy, rounds, 8, on_nonfinite="skip") for _ in range(2))
    for closures in parts[:4]:
        session.step(closures)
    other.load_state_dict(session.state_dict())
    other.remember(parts[step] for step in (0, 1, 3))
    for closures in parts[4:]:
        session.step(closures)
        other.step(closures)
    network = session.finalize()
    expected = other.finalize([part for step in (4, 5, 7) for part in data[step][0].split(4)])
    assert torch.equal(network.mask, expected.mask)
    assert_same(network.module.state_dict(), expected.module.state_dict())


def test_a_pass_may_write_over_the_gradients_of_the_part_before() -> None:
    """As a CUDA graph does, whose memory is the same in all passes."""
    made: list[Tensor] = []

    def replayed(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        for gradient in made:
            gradient.fill_(torch.nan)
        made.clear()
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: made.append(p.grad))
        return loss_fn(network, batch)

    found = []
    for closure in (loss_fn, replayed):
        session = make_session(small_net(), PolicyConfig(rho=1.0), RoundConfig(k=2))
        for x, y in batches(3):
            session.step([partial(closure, batch=part) for part in ((x[:4], y[:4]), (x[4:], y[4:]))])
        found.append(arrays(session))
    assert_same(*found)


def test_rolling_back_goes_on_from_the_end_of_the_round_before() -> None:
    session = make_session(
        small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=3), on_nonfinite="rollback"
    )
    data = Spoiled().batches
    for batch in data[:3]:
        session.step(loss_of(batch))
    good, s = arrays(session), session.policy.s.clone()
    for batch in data[3:6]:
        session.step(loss_of(batch))
    assert_same(arrays(session), good)
    assert torch.equal(session.policy.s, s)
    for batch in data[6:]:
        session.step(loss_of(batch))
    assert not torch.equal(arrays(session)[WEIGHTS], good[WEIGHTS])


def test_an_average_that_a_rollback_takes_back_begins_anew() -> None:
    """In the first round that keeps one: with the weights, and not with what the store had before, zeros."""
    policy, rounds = PolicyConfig(rho=1.0), RoundConfig(k=5)
    session = make_session(small_net(), policy, rounds, ema=0.9, on_nonfinite="rollback")
    for batch in Spoiled().batches:
        session.step(loss_of(batch))
    session.records()
    assert session.ema_steps == 4, "of the second round"
    average, weights = (arrays(session)[kind] for kind in (EMA, WEIGHTS))
    assert float((average - weights).norm() / weights.norm()) < 0.2


def run_transfers(
    reference: str, k: int, steps: int, transfer: str, optim: OptimConfig = OPTIM
) -> dict[str, Tensor]:
    """Everything that a run ends with, for one way of moving the weights."""
    rounds = RoundConfig(k=k, reference=reference, freeze_at=0.7, transfer=transfer)  # type: ignore[arg-type]
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), rounds, total=steps, optimizer=optim)
    for batch in batches(steps):
        session.step(loss_of(batch))
    found = {**arrays(session), "s": session.policy.s}
    session.transfers.close()
    return found


@pytest.mark.parametrize("reference", ["every_step", "turns", "round_start"])
@pytest.mark.parametrize(
    ("name", "k"),
    [
        *(("sgd", 3), ("adamw", 1)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sgd", 1), ("adamw", 3))),
    ],
)
def test_however_the_weights_are_moved_the_bits_are_the_same(reference: str, k: int, name: str) -> None:
    """Full transfers between rounds, delta transfers between rounds, delta transfers beside the steps."""
    optim = {"sgd": OPTIM, "adamw": OptimConfig(name="adamw", lr=1e-2)}[name]
    plain = run_transfers(reference, k, 14, "full", optim)
    for transfer in ("delta", "overlap"):
        assert_same(run_transfers(reference, k, 14, transfer, optim), plain)


@pytest.mark.parametrize("transfer", ["full", "delta"])
@pytest.mark.parametrize(("work", "at"), [("fetch", (0, 3)), ("put_back", (3,))])
def test_a_transfer_that_has_failed_is_made_again(
    transfer: str, work: str, at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = RoundConfig(k=3, transfer=transfer)  # type: ignore[arg-type]
    disturbed, other = (make_session(small_net(), PolicyConfig.paper(rho=0.5), rounds) for _ in range(2))

    def fails(*moves: object) -> int:
        raise MemoryError("no room")

    for step, batch in enumerate(batches(8)):
        if step in at:
            monkeypatch.setattr(disturbed.store, work, fails)
            with pytest.raises(MemoryError, match="no room"):
                disturbed.step(loss_of(batch))
            monkeypatch.undo()
        for session in (disturbed, other):
            session.step(loss_of(batch))
    assert_same(arrays(disturbed), arrays(other))


def test_records_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sparse.engine.rounds.MOST_RECORDS", 3)
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=2))
    losses = [float(session.step(loss_of(batch))) for batch in batches(5)]
    assert [record.loss for record in session.records()] == losses[-3:]
    assert session.records() == []


def test_only_newcomers_and_leavers_cross_the_bus() -> None:
    """Bytes counted in the store = entries of which exactly one of two successive subnets knows."""
    rounds = RoundConfig(k=1, reference="round_start", freeze_at=1.0, prefetch=False)
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5, lr=0.0), rounds)
    kept = []
    for i, batch in enumerate(batches(4)):
        kept.append(session.policy.sample(i))
        session.step(loss_of(batch))
    entries = [[_kept_entries(session, mask) for mask in masks] for masks in kept]
    fetched = returned = 0
    for i, (a, b) in enumerate(entries):
        old_a, old_b = entries[i - 1] if i else (torch.zeros_like(a), torch.zeros_like(a))
        known = old_a | old_b
        weights, buffers = a.numel() - _BUFFERS, slice(a.numel() - _BUFFERS, None)
        fetched += int((a & ~known).sum() + (b & ~known & ~a).sum())  # weights and statistics
        fetched += int((a & ~old_a)[:weights].sum())  # momentum, which only a subnet that is trained has
        leaving = old_a & ~a
        returned += int(leaving.sum() + leaving[:weights].sum())
        assert bool(known[buffers].any()) == bool(i)
    assert session.transfers.bytes_fetched == fetched * 8
    assert session.transfers.bytes_returned == returned * 8


_BUFFERS = 2 * (6 + 8)


def _kept_entries(session: SparseOffload, mask: Tensor) -> Tensor:
    """bool, in the order of the store: weights, then statistics."""
    inside = entry_masks(session.channel_map, mask)
    names = [
        *session.store.partitions[WEIGHTS].layout.shapes,
        *session.store.partitions["buffers"].layout.shapes,
    ]
    return torch.cat([inside[name].flatten().bool() for name in names])


def test_the_final_mask_is_the_candidate_with_the_lowest_training_loss() -> None:
    session = make_session(
        small_net(),
        PolicyConfig.paper(rho=0.5),
        RoundConfig(k=2),
        final=configured(FinalConfig, candidates=5, selection_batches=2),
    )
    data = batches(4)
    for batch in data:
        session.step(loss_of(batch))
    candidates = session.policy.candidates(5)
    network = session.finalize([data[0][0]])
    losses = []
    for mask in candidates:
        side = session.transfers.scratch()
        side.load(session.transfers.selection(mask), (WEIGHTS, "buffers"))
        with side.buffers_untouched():
            found = [float(session.forward.evaluated(side.module, loss_of(b))) for b in data[-2:]]
        losses.append(sum(found))
    assert torch.equal(network.mask, candidates[losses.index(min(losses))])
    assert len({round(value, 9) for value in losses}) > 1


def test_after_the_freeze_only_the_final_mask_is_trained() -> None:
    """And ``s`` stands still."""
    session = make_session(
        small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=4, freeze_at=0.5), total=12
    )
    data = batches(12)
    for batch in data[:7]:
        session.step(loss_of(batch))
    s = session.policy.s.clone()
    weights = arrays(session)[WEIGHTS]
    mask = session.final_mask
    assert mask is not None
    for batch in data[7:]:
        session.step(loss_of(batch))
    assert torch.equal(session.policy.s, s)
    changed = arrays(session)[WEIGHTS] != weights
    entries = session.store.partitions[WEIGHTS].layout.view(changed, "conv1.weight")
    assert not bool(entries[~mask[:6]].any())
    network = session.finalize([data[0][0]])
    assert torch.equal(network.mask, mask)


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_evaluation_leaves_no_trace(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """A run with evaluations in the middle of rounds equals one without."""
    runs = []
    for evaluate in (False, True):
        session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=3))
        for i, batch in enumerate(batches(6)):
            if evaluate and i in (0, 2, 3):
                with mode(), session.evaluation([batches(1, seed=9)[0][0]]) as module:
                    module.eval()(batch[0])
            session.step(loss_of(batch))
        runs.append(arrays(session))
    assert_same(*runs)


def test_the_expected_cost_is_the_mean_over_masks() -> None:
    """In the end it is the cost of the final mask."""
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=2, freeze_at=0.5), total=8)
    full = session.channel_map.full_mask()
    masks = [mask for r in range(3) for mask in session.policy.sample(r)]
    flops = sum(session.cost.flops(m) for m in masks) / 6 / session.cost.flops(full)
    assert session.expected_cost(rounds=3)[1] == pytest.approx(flops)
    for batch in batches(6):
        session.step(loss_of(batch))
    assert session.final_mask is not None
    kept = session.cost.parameters(session.final_mask) / session.cost.parameters(full)
    assert session.expected_cost()[0] == pytest.approx(kept)


def test_passes_are_counted_as_they_are_run() -> None:
    """Every step: one backward (two forwards' worth) and two forwards, on the subnets really used."""
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=2, reference="turns"))
    expected = 0.0
    for round_index in range(2):
        a, b = (session.cost.flops(m) for m in session.policy.sample(round_index))
        session_steps = batches(2, seed=round_index)
        for batch in session_steps:
            session.step(loss_of(batch))
        expected += (3 * a + b) + (3 * b + a)
    assert session.forward_flops == expected


def test_what_an_abandoned_policy_was_asked_is_left_out() -> None:
    """Whoever asks for it afterwards, to report an error, does not meet another one."""
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=2, transfer="overlap"))
    for batch in batches(2):
        session.step(loss_of(batch))
    s, begin = session.policy.s.clone(), threading.Event()
    session.transfers.aside(begin.wait)
    session.transfers.aside(lambda: None)
    assert session.transfers._side_stream is not None
    session.transfers._side_stream._worker.shutdown(wait=False, cancel_futures=True)
    begin.set()
    assert torch.equal(session.policy.s, s)
