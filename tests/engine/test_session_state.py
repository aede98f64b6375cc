"""Invariant 8: a session that is saved and restored at any step ends with the bits of one that was not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offload_sparse.engine.config import FinalConfig, OptimConfig, RoundConfig
from offload_sparse.engine.optimizer import OptimizerFactory
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import MethodState, restore_session, session_state
from offload_sparse.policy.config import PolicyConfig
from tests.support.constants import configured
from tests.support.optimizers import Corrected, Counting
from tests.support.ranks import run_ranks
from tests.support.sessions import (
    POLICIES,
    arrays,
    assert_same,
    batches,
    loss_of,
    make_session,
    own_part,
    small_net,
)

STEPS = 14
ADAMW = OptimConfig(name="adamw", lr=1e-2)


PLAIN = PolicyConfig.paper(rho=0.5, lr=0.05)


def session_of(
    reference: str, transfer: str, prefetch: bool = True, policy: PolicyConfig = PLAIN
) -> SparseOffload:
    rounds = RoundConfig(
        k=4,
        subnets="shared" if reference == "turns" else "references",
        reference=reference,  # type: ignore[arg-type]
        freeze_at=0.7,
        prefetch=prefetch,
        transfer=transfer,  # type: ignore[arg-type]
    )
    final = configured(FinalConfig, candidates=4, selection_batches=2)
    return make_session(small_net(), policy, rounds, STEPS, optimizer=ADAMW, final=final)


def through_a_file(state: MethodState) -> MethodState:
    """What is left of a state after it has been written and read: copies, and JSON."""
    return replace(copy.deepcopy(state), meta=json.loads(json.dumps(state.meta)))


def result(session: SparseOffload) -> dict[str, Tensor]:
    found = arrays(session)
    assert session.final_mask is not None
    found |= {"s": session.policy.s, "mask": session.final_mask}
    found |= {f"policy/{name}": value for name, value in session.policy.state_dict().items()}
    found["flops"] = torch.tensor([session.forward_flops, session.steps_done, session.rounds_done])
    session.transfers.close()
    return found


def straight(
    reference: str, transfer: str, prefetch: bool = True, policy: PolicyConfig = PLAIN
) -> dict[str, Tensor]:
    session = session_of(reference, transfer, prefetch, policy)
    for batch in batches(STEPS):
        session.step(loss_of(own_part(batch)))
    return result(session)


def interrupted(
    reference: str, transfer: str, cuts: Iterable[int], prefetch: bool = True, policy: PolicyConfig = PLAIN
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """One run that is saved at every cut, and the ends of the runs that go on from there."""
    data = [own_part(batch) for batch in batches(STEPS)]
    first = session_of(reference, transfer, prefetch, policy)
    states = {}
    for step, batch in enumerate(data):  # what the first run does after it has been saved must not matter
        if step in cuts:
            first.records()
            states[step] = through_a_file(session_state(first))
        first.step(loss_of(batch))
    first.transfers.close()
    for cut, state in states.items():
        second = session_of(reference, transfer, prefetch, policy)
        restore_session(second, state)
        second.remember(map(loss_of, data[max(0, cut - 2) : cut]))
        for batch in data[cut:]:
            second.step(loss_of(batch))
        yield cut, result(second)


@pytest.mark.parametrize(
    ("reference", "transfer", "prefetch"),
    [
        ("turns", "delta", True),
        ("turns", "overlap", True),
        ("every_step", "overlap", True),
        ("turns", "delta", False),
    ],
)
def test_a_session_restored_at_any_step_ends_with_the_same_bits(
    reference: str, transfer: str, prefetch: bool
) -> None:
    """Between rounds, in the middle of one, before and after the final mask is chosen."""
    expected = straight(reference, transfer, prefetch)
    # In one configuration every step; in the others a round's begin, middle and end, and the freeze.
    every_step = reference == "turns" and prefetch and transfer == "delta"
    cuts = range(STEPS) if every_step else (0, 1, 4, 6, 9, 10, 12)
    for cut, found in interrupted(reference, transfer, cuts, prefetch):
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{name}, cut after step {cut}"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_restored_bit_for_bit(name: str) -> None:
    """In the middle of two rounds: s, control variate, diagnostics, rho and all."""
    policy = POLICIES[name]
    expected = straight("turns", "delta", policy=policy)
    for cut, found in interrupted("turns", "delta", (2, 6), policy=policy):
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{key}, cut after step {cut}"


@pytest.mark.parametrize("optimizer", [Counting, Corrected])
def test_what_an_optimizer_keeps_beside_its_slots_is_restored(optimizer: OptimizerFactory) -> None:
    """A count in its groups, a number of 64 bits; in a session that has gone on since, too."""
    rounds, data = RoundConfig(k=3), batches(7)
    one, other = (make_session(small_net(), PLAIN, rounds, optimizer=optimizer) for _ in range(2))
    for batch in data[:4]:
        one.step(loss_of(batch))
    one.records()
    state = through_a_file(session_state(one))
    ends = []
    for session in (one, other, one):
        if ends:
            restore_session(session, state)
        for batch in data[4:]:
            session.step(loss_of(batch))
        ends.append(arrays(session))
    for end in ends:
        assert_same(end, ends[0])


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_round_that_an_evaluation_has_begun_is_carried_on(prefetch: bool) -> None:
    """Its masks are drawn, and those of the round after it, but it has no step behind it yet."""
    data = batches(STEPS)
    for cut in (4, 8, 10, 12):
        first = session_of("turns", "delta", prefetch)
        for batch in data[:cut]:
            first.step(loss_of(batch))
        with first.evaluation([batch[0] for batch in data[:2]]):
            pass
        first.records()
        state = through_a_file(session_state(first))
        second = session_of("turns", "delta", prefetch)
        restore_session(second, state)
        second.remember(map(loss_of, data[max(0, cut - 2) : cut]))
        for batch in data[cut:]:
            first.step(loss_of(batch))
            second.step(loss_of(batch))
        expected, found = result(first), result(second)
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not wrong, f"after step {cut}"


def test_saving_at_every_step_changes_nothing() -> None:
    session = session_of("turns", "overlap")
    for batch in batches(STEPS):
        session_state(session)
        session.step(loss_of(batch))
    assert_same(result(session), straight("turns", "overlap"))


def cuts_on_ranks(reference: str) -> list[str]:
    expected = straight(reference, "overlap")
    wrong = []
    for cut, found in interrupted(reference, "overlap", (0, 4, 6, 9, 11)):
        wrong += [f"{n} after step {cut}" for n in expected if not torch.equal(found[n], expected[n])]
    return wrong


@pytest.mark.parametrize("reference", ["turns", "every_step"])
def test_two_ranks_in_the_middle_of_a_round_have_statistics_of_their_own(reference: str) -> None:
    """BatchNorm statistics differ between ranks until the round ends; each rank gets its own back, and with
    ``every_step`` its own reference, too.
    """
    assert run_ranks(2, cuts_on_ranks, reference) == [[], []]


def test_a_state_of_another_model_is_refused() -> None:
    session = session_of("turns", "delta")
    state = through_a_file(session_state(session))
    other = copy.deepcopy(state)
    del other.replicated["policy/s"]
    with pytest.raises(ValueError, match="another model"):
        restore_session(session_of("turns", "delta"), other)
    other = copy.deepcopy(state)
    other.sharded.pop(next(iter(other.sharded)))
    with pytest.raises(ValueError, match="another model or optimizer"):
        restore_session(session_of("turns", "delta"), other)
    for name, value in {"ema_steps": 1, "forward_flops": "x" * 10_000}.items():
        other = copy.deepcopy(state)
        other.meta[name] = value
        with pytest.raises(ValueError, match=rf"\('?{name}'?\); is it of another model"):
            restore_session(session_of("turns", "delta"), other)
