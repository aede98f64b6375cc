"""A session is saved and resumed as its user does it: torch.save, accelerate,
torch.distributed.checkpoint.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from tests.support.ranks import run_ranks
from tests.support.sessions import (
    arrays,
    assert_same,
    batches,
    loss_of,
    make_session,
    own_part,
    small_net,
    whole,
)

STEPS = 14
NADAM = partial(torch.optim.NAdam, lr=1e-2)
"""Not fused, with a scalar of its own beside the number of steps."""


def new_session() -> SparseOffload:
    net = small_net()
    net.conv2.requires_grad_(False)
    return make_session(
        net,
        PolicyConfig.paper(rho=0.5, lr=0.05),
        RoundConfig(k=4, freeze_at=0.7),
        STEPS,
        NADAM,
        groups=lambda name: {"lr": 0.02} if name.startswith("head") else None,
        ema=0.5,
    )


def scheduled(session: SparseOffload) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(session.optimizer, 3, 0.5)


def train(session: SparseOffload, first: int, last: int) -> None:
    schedule = scheduled(session)
    schedule.last_epoch = first
    for batch in batches(STEPS)[first:last]:
        session.step(loss_of(own_part(batch)))
        schedule.step()


def result(session: SparseOffload) -> dict[str, Tensor]:
    session.settle()
    found = {kind: whole(session.store, kind) for kind in session.store.partitions}
    assert session.final_mask is not None
    return found | {"s": session.policy.s.clone(), "mask": session.final_mask}


@cache
def straight() -> dict[str, Tensor]:
    session = new_session()
    train(session, 0, STEPS)
    return result(session)


@pytest.mark.parametrize("cut", [0, 3, pytest.param(4, marks=pytest.mark.slow), 8, 12])
def test_a_state_dict_resumes_bit_for_bit(cut: int, tmp_path: Path) -> None:
    """Between rounds, in the middle of one, and in the final phase; what the first run does later is no
    matter.
    """
    first = new_session()
    train(first, 0, cut)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    train(first, cut, STEPS)
    second = new_session()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.remember(map(loss_of, batches(STEPS)[max(0, cut - 4) : cut]))
    train(second, cut, STEPS)
    assert_same(result(second), straight())
    assert second.ema_steps == first.ema_steps > 0


def test_a_search_that_was_asked_to_end_ends_in_a_session_that_resumes() -> None:
    """And goes on where a state from before that is loaded; steps that were left out stay counted."""
    policy, rounds = PolicyConfig.paper(rho=0.5), RoundConfig(k=4)
    session, other = (make_session(small_net(), policy, rounds) for _ in range(2))
    before = session.state_dict()
    for batch in batches(2):
        session.step(loss_of(batch))
    session.nonfinite.restore(3)
    session.freeze()
    other.load_state_dict(session.state_dict())
    assert other.nonfinite.skipped == 3
    for batch in batches(3):
        other.step(loss_of(batch))
    assert other.frozen
    other.load_state_dict(before)
    for batch in batches(5):
        other.step(loss_of(batch))
    assert not other.frozen
    assert other.nonfinite.skipped == 0


def test_a_rollback_behind_a_saved_state_comes_back_to_it_when_resumed() -> None:
    """Within the round that was saved: both come back to where the store is since then."""
    policy, rounds = PolicyConfig.paper(rho=0.5, lr=0.05), RoundConfig(k=4)
    one, two = (make_session(small_net(), policy, rounds, on_nonfinite="rollback") for _ in range(2))
    data = batches(10)
    data[7][0].fill_(torch.nan)
    for batch in data[:6]:
        one.step(loss_of(batch))
    two.load_state_dict(one.state_dict())
    for batch in data[6:]:
        one.step(loss_of(batch))
        two.step(loss_of(batch))
    assert_same(arrays(two) | {"s": two.policy.s}, arrays(one) | {"s": one.policy.s})


def test_rates_that_a_scheduler_has_set_are_resumed() -> None:
    first = new_session()
    train(first, 0, 7)
    second = new_session()
    second.load_state_dict(first.state_dict())
    rates = [group["lr"] for group in second.optimizer.param_groups]
    assert rates == [group["lr"] for group in first.optimizer.param_groups] == [0.01 / 4, 0.02 / 4]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_rate_that_numpy_has_computed_is_resumed(kind: type[np.floating[Any]], tmp_path: Path) -> None:
    first, second = new_session(), new_session()
    first.optimizer.param_groups[0]["lr"] = kind(0.25)
    train(first, 0, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.optimizer.param_groups[0]["lr"] == 0.25


def test_accelerate_saves_a_registered_session(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    session = new_session()
    accelerator.register_for_checkpointing(session)
    train(session, 0, 6)
    accelerator.save_state(str(tmp_path))
    train(session, 6, 9)
    accelerator.load_state(str(tmp_path))
    train(session, 6, STEPS)
    assert_same(result(session), straight())


def test_distributed_checkpoint_saves_and_loads_a_session(tmp_path: Path) -> None:
    first, second = new_session(), new_session()
    train(first, 0, 6)
    dcp.save({"session": first}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"session": second}, checkpoint_id=tmp_path, no_dist=True)
    train(second, 6, STEPS)
    assert_same(result(second), straight())


# --- several ranks ---


WAYS = ("torch", "dcp")
Tensors = dict[str, Tensor]


def saved(folder: str, cut: int) -> dict[str, tuple[Tensors, Tensors]]:
    """For every way the state at ``cut``, which is saved, and at the end."""
    found = {}
    for way in WAYS:
        session = new_session()
        train(session, 0, cut)
        save(session, f"{folder}/{way}", way)
        at_cut = small_parts(session)
        train(session, cut, STEPS)
        found[way] = at_cut, result(session)
    return found


def small_parts(session: SparseOffload) -> dict[str, Tensor]:
    session.settle()
    found = {kind: whole(session.store, kind) for kind in session.store.partitions if kind != "buffers"}
    return found | {"s": session.policy.s.clone(), "steps": torch.tensor(session.steps_done)}


def save(session: SparseOffload, folder: str, way: str) -> None:
    if way == "dcp":
        dcp.save({"session": session}, checkpoint_id=folder)
        return
    state = session.state_dict()
    rank = dist.get_rank() if dist.is_initialized() else 0
    assert bool(state["rows"]) == (rank == 0), "rank 0 alone holds the rows"
    if rank == 0:
        Path(folder).mkdir()
        torch.save(state, f"{folder}/state.pt")


def resumed(folder: str, cut: int, end: int) -> dict[str, tuple[Tensors, Tensors]]:
    found = {}
    for way in WAYS:
        session = new_session()
        place = f"{folder}/{way}"
        if way == "dcp":
            dcp.load({"session": session}, checkpoint_id=place, no_dist=not dist.is_initialized())
        else:
            session.load_state_dict(torch.load(f"{place}/state.pt", weights_only=True))
        loaded = small_parts(session)
        train(session, cut, end)
        found[way] = loaded, result(session) if end == STEPS else {}
    return found


def test_saved_by_two_ranks_in_a_round_and_resumed_by_one_two_and_three(tmp_path: Path) -> None:
    """The same bits in the store on any number of ranks; two end with those of the run that went on (one
    would up to the order of sums, and batches of 8 do not divide by three: these load and step).
    """
    cut = 6
    before = run_ranks(2, saved, str(tmp_path), cut)[0]
    for world_size in (1, 2, 3):
        end = STEPS if world_size == 2 else cut + 1
        for found in run_ranks(world_size, resumed, str(tmp_path), cut, end):
            for way, (loaded, finished) in found.items():
                assert_same(loaded, before[way][0])
                if world_size == 2:
                    assert_same(finished, before[way][1])


# --- what is refused ---


def other_state(change: str) -> dict[str, Any]:
    state = new_session().state_dict()
    if change == "rows":
        del state["rows"]["weights/conv1.weight"]
    elif change == "shape":
        state["rows"]["exp_avg/conv1.weight"] = torch.zeros(3)
    elif change == "bytes":
        state["small"] = b"not a state"
    elif change == "groups":
        policy, rounds = PolicyConfig.paper(rho=0.5), RoundConfig(k=4)
        state = make_session(small_net(), policy, rounds, STEPS, NADAM, ema=0.5).state_dict()
    return state if change else {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows", "differ in 'weights/conv1.weight'"),
        ("shape", "differ in 'exp_avg/conv1.weight'"),
        ("bytes", "no state_dict of a session"),
        ("groups", "1 parameter groups, this session 2"),
        ("", "no state_dict of a session"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change: str, message: str) -> None:
    session = new_session()
    train(session, 0, 2)
    before = arrays(session)
    with pytest.raises(ValueError, match=message):
        session.load_state_dict(other_state(change))
    assert_same(arrays(session), before)
