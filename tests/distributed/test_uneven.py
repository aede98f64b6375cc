"""Ranks with different numbers of batches, and ranks that no longer answer."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.rounds import CHECK_RANKS
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.weight_store import Ranks
from tests.support.ranks import run_ranks
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net, whole

POLICY = PolicyConfig.paper(rho=0.5, lr=0.05)
NADAM, NADAM_SLOTS = partial(torch.optim.NAdam, lr=0.01), ("exp_avg", "exp_avg_sq")


def state_of(session: SparseOffload) -> dict[str, Any]:
    session.settle()
    found = {kind: whole(session.store, kind) for kind in ("weights", "momentum_buffer")}
    return found | {"s": session.policy.s.clone(), "steps": session.steps_done}


def uneven(missing: int, reference: str, end: str) -> dict[str, Any]:
    """Rank 1 has fewer batches, and says so; both end the same way, and rank 0 alone makes the last steps."""
    rounds = RoundConfig(k=4, reference=reference)  # type: ignore[arg-type]
    network = small_net(end in ("evaluation", "finalize"))
    session = make_session(network, POLICY, rounds, total=100 - 40 * dist.get_rank())
    steps = 10 - dist.get_rank() * missing
    for x, y in batches(steps, seed=dist.get_rank()):
        session.step(loss_of((x, y)))
    found: dict[str, Any] = {}
    if end == "finalize":
        module = session.finalize().module
        found["network"] = [p.detach().clone() for p in module.parameters()]
    elif end == "evaluation":
        with session.evaluation() as network:
            found["network"] = [p.detach().clone() for p in network.parameters()]
        session.step(loss_of(batches(1, seed=5)[0]))
    elif end == "state_dict":
        session.state_dict()
    found["counted"] = {int(value) for value in session.transfers.integer_buffers.values()}
    return found | state_of(session)


def by_one_process(missing: int, reference: str) -> dict[str, Any]:
    """Both ranks' batches in parts of one step; then those of rank 0 alone."""
    rounds = RoundConfig(k=4, reference=reference)  # type: ignore[arg-type]
    session = make_session(small_net(False), POLICY, rounds, total=100)
    first, second = batches(10, seed=0), batches(10 - missing, seed=1)
    for step, batch in enumerate(first):
        closures = [loss_of(batch)] + ([loss_of(second[step])] if step < len(second) else [])
        session.step(closures)
    return state_of(session)


@pytest.mark.parametrize("missing", [1, 3])
@pytest.mark.parametrize(("reference", "end"), [("turns", "state_dict"), ("every_step", "settle")])
def test_a_rank_with_fewer_batches_takes_part_in_others_steps(missing: int, reference: str, end: str) -> None:
    """In the middle of a round and over its end; as one process that steps on whatever batches there are."""
    expected = by_one_process(missing, reference)
    for found in run_ranks(2, uneven, missing, reference, end):
        assert found["steps"] == 10
        for name in ("weights", "momentum_buffer", "s"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10, msg=name)


def two_epochs(catches_up: bool) -> dict[str, Any] | str:
    """With a rate for every step, and an optimizer that keeps more than slots; rank 1 has fewer batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECK_RANKS, "1")
        session = make_session(small_net(False), POLICY, RoundConfig(k=4), total=100, optimizer=NADAM)
    schedule = CosineAnnealingLR(session.optimizer, 20)
    missing = 3 * dist.get_rank() if dist.is_initialized() else 0
    try:
        for epoch in range(2):
            for step in range(10 - missing):
                while catches_up and schedule.last_epoch < session.steps_done:
                    schedule.step()
                seeds = [dist.get_rank()] if dist.is_initialized() else [0, 1][: 2 if step < 7 else 1]
                session.step([loss_of(batches(20, seed=seed)[10 * epoch + step]) for seed in seeds])
                if not catches_up:
                    schedule.step()
            session.state_dict()
    except ValueError as error:
        return str(error)
    session.settle()
    return {kind: whole(session.store, kind) for kind in ("weights", *NADAM_SLOTS)}


def test_a_rank_with_fewer_batches_goes_on_with_the_rates_of_the_others() -> None:
    """In the middle of a round and over its end; as one process that steps on whatever batches there are."""
    expected = two_epochs(True)
    assert not isinstance(expected, str)
    for found in run_ranks(2, two_epochs, True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_ranks_whose_rates_differ_do_not_train_on() -> None:
    first, second = run_ranks(2, two_epochs, False)
    assert first == second
    assert first.startswith("lr of parameter group 0 is 0.0")
    assert "while scheduler.last_epoch < session.steps_done: scheduler.step()" in first


def rates_of_epochs() -> str:
    """A rate for every epoch, of which rank 1 begins the second one earlier, within a round."""
    session = make_session(small_net(False), POLICY, RoundConfig(k=4))
    schedule = ExponentialLR(session.optimizer, 0.5)
    try:
        for length in (6 - dist.get_rank(), 4 + dist.get_rank()):
            for batch in batches(length):
                session.step(loss_of(batch))
            schedule.step()
    except ValueError as error:
        return str(error)
    return ""


def test_a_step_that_ranks_make_with_different_rates_is_an_error() -> None:
    first, second = run_ranks(2, rates_of_epochs)
    assert first == second
    assert first.startswith("ranks 0 and 1 have made a step with different settings of the optimizer")


def search_ended_by_one() -> dict[str, Any]:
    """The first rank asks for it, in the middle of a round."""
    session = make_session(small_net(False), POLICY, RoundConfig(k=4))
    for step, batch in enumerate(batches(11)):
        session.step(loss_of(own_part(batch)))
        if step == 5 and not (dist.is_initialized() and dist.get_rank()):
            session.freeze()
    assert session.final_mask is not None
    return state_of(session) | {"mask": session.final_mask.double()}


def test_what_one_rank_asks_of_the_search_counts_for_all() -> None:
    expected = search_ended_by_one()
    for found in run_ranks(2, search_ended_by_one):
        for name in ("mask", "weights", "momentum_buffer", "s"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("end", ["finalize", "evaluation"])
def test_ranks_meet_in_evaluation_and_at_the_end(end: str) -> None:
    first, second = run_ranks(2, uneven, 1, "turns", end)
    assert first["counted"] == second["counted"] == {first["steps"]} == {second["steps"]}
    for a, b in zip(first["network"], second["network"], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first["weights"], second["weights"])


def apart() -> tuple[str, int]:
    """Rank 0 saves within its epoch, when rank 1 has ended its own."""
    session, rank = make_session(small_net(False), POLICY, RoundConfig(k=4)), dist.get_rank()
    for batch in batches(5 - 2 * rank):
        session.step(loss_of(batch))
    said = ""
    try:
        with session.evaluation() if rank else nullcontext(session.state_dict()):
            pass
    except ValueError as error:
        said = str(error)
    return said, len(session.state_dict())


def saved_by_the_first_alone() -> str:
    """As a script does that saves on its main process only."""
    session = make_session(small_net(False), POLICY, RoundConfig(k=4))
    try:
        for _ in range(2):
            for batch in batches(3):
                session.step(loss_of(batch))
            if dist.get_rank() == 0:
                session.state_dict()
        session.finalize()
    except ValueError as error:
        return str(error)
    return ""


def different_calls() -> tuple[str, tuple[str, int]]:
    return saved_by_the_first_alone(), apart()


def test_ranks_that_wait_for_each_other_in_different_calls_say_so() -> None:
    """And go on."""
    first, second = run_ranks(2, different_calls)
    assert first == second
    alone, (said, _) = first
    assert alone.startswith("the call of the session is state_dict on rank 0 and finalize on rank 1; every")
    assert said.startswith("the call of the session is state_dict on rank 0 and evaluation on rank 1; every")


def waits_no_longer_than_asked() -> bool:
    """Rank 1 never takes part in a gather."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    session = make_session(small_net(), POLICY, RoundConfig(k=2))
    failed = False
    if dist.get_rank() == 0:
        try:
            session.step(loss_of(batches(1)[0]))
        except RuntimeError:
            failed = True
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
    return failed


def timeouts() -> list[float]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77))
    ranks, device = Ranks.current(), torch.device("cpu")
    groups = [ranks.host_group, ranks.transfer_group]
    return [g._get_backend(device).options._timeout.total_seconds() for g in groups if g is not None]


def test_groups_of_a_session_wait_as_long_as_the_default_one() -> None:
    assert run_ranks(2, timeouts) == [[77.0, 77.0]] * 2


def test_a_rank_that_does_not_answer_in_a_gather_is_given_up() -> None:
    """Long before the limit of ``run_ranks``."""
    assert run_ranks(2, waits_no_longer_than_asked)[0]


def every_batch_is_bad(mode: str) -> tuple[str, int]:
    session = make_session(small_net(), POLICY, RoundConfig(k=3), on_nonfinite=mode)
    try:
        for x, y in batches(60):
            session.step(loss_of((torch.full_like(x, torch.nan), y)))
    except FloatingPointError as error:
        return str(error), session.steps_done
    return "", session.steps_done


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_a_run_of_bad_batches_ends_on_all_ranks(mode: str) -> None:
    for message, steps in run_ranks(2, every_batch_is_bad, mode):
        assert "too many steps are not finite" in message
        assert 10 <= steps <= 15


def now_and_then_bad(x: Tensor, step: int) -> Tensor:
    return torch.full_like(x, torch.nan) if step % 20 == 7 else x


def test_a_bad_batch_now_and_then_ends_nothing() -> None:
    session = make_session(small_net(), POLICY, RoundConfig(k=3), on_nonfinite="skip")
    for step, (x, y) in enumerate(batches(60)):
        session.step(loss_of((now_and_then_bad(x, step), y)))
    assert sum(bool(record.fault) for record in session.records()) == 3
