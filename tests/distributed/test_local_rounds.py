"""Ranks that talk once per round: against local SGD on the full weights, and what holds of them besides."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload_sparse.engine.config import FinalConfig, OptimConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import restore_session, session_state
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS
from tests.engine.reference import LocalTrainer
from tests.support.channel_maps import small_map
from tests.support.constants import configured
from tests.support.ranks import run_ranks
from tests.support.sessions import (
    OPTIM,
    batches,
    loss_of,
    make_session,
    own_part,
    redrawing,
    small_net,
    whole,
)

BERNOULLI = PolicyConfig.paper(rho=0.5, lr=0.05)
PERSISTENT = redrawing(0.3, PolicyConfig.paper(rho=0.5, sampler="persistent", lr=0.05))
PLAIN = OptimConfig(lr=0.05, momentum=0.0, weight_decay=1e-2)

CASES: dict[str, tuple[RoundConfig, PolicyConfig]] = {
    "turns": (RoundConfig(k=4), BERNOULLI),
    "persistent": (RoundConfig(k=3), PERSISTENT),
    "every_step": (RoundConfig(k=3, reference="every_step"), BERNOULLI),
    "outer": (configured(RoundConfig, k=2, sync="round", outer_lr=0.7, outer_momentum=0.6), BERNOULLI),
    "per_rank": (RoundConfig(k=3, sync="round", subnets="per_rank"), BERNOULLI),
    "per_rank, persistent": (RoundConfig(k=3, sync="round", subnets="per_rank"), PERSISTENT),
    "partition": (RoundConfig(k=3, sync="round", subnets="partition", outer_momentum=0.5), BERNOULLI),
}


def of_case(name: str) -> tuple[RoundConfig, PolicyConfig]:
    rounds, policy = CASES[name]
    return dataclasses.replace(rounds, sync="round", freeze_at=1.0, prefetch=False), policy


def state_of(session: SparseOffload) -> dict[str, torch.Tensor]:
    session.settle()
    found = {k: whole(session.store, k) for k in (WEIGHTS, *session.store.slots, BUFFERS)}
    return found | {"s": session.policy.s.clone()}


def trained(optimizer: OptimConfig, rounds: RoundConfig, policy: PolicyConfig, steps: int) -> Any:
    session = make_session(small_net(False), policy, rounds, optimizer=optimizer)
    session.check_ranks = True
    for batch in batches(steps, size=12):
        session.step(loss_of(own_part(batch)))
    return state_of(session)


def local_rounds() -> dict[str, Any]:
    """Three rounds of every case; and K = 1 without momentum, of both ways to talk."""
    found = {name: trained(OPTIM, *of_case(name), 3 * CASES[name][0].k) for name in CASES}
    for sync in ("step", "round"):
        rounds = RoundConfig(k=1, sync=sync, reference="every_step", freeze_at=1.0)  # type: ignore[arg-type]
        found[sync] = trained(PLAIN, rounds, BERNOULLI, 5)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_local_rounds_are_local_sgd_on_the_full_weights(world_size: int) -> None:
    """Weights, momentum and s, in float64; with K = 1 and SGD the same as if ranks talked at every step."""
    results = run_ranks(world_size, local_rounds)
    net = small_net(False)
    for name in CASES:
        rounds, policy = of_case(name)
        expected = LocalTrainer(net, small_map(net), policy, rounds, OPTIM, seed=3)
        expected.train(batches(3 * rounds.k, size=12), world_size)
        flat = {
            kind: torch.cat([value.flatten() for value in values.values()])
            for kind, values in ((WEIGHTS, expected.weights), ("momentum_buffer", expected.momentum))
        }
        for found in results:
            for kind, value in flat.items():
                torch.testing.assert_close(
                    found[name][kind], value, rtol=1e-9, atol=1e-11, msg=f"{name} {kind}"
                )
            torch.testing.assert_close(found[name]["s"], expected.policy.s, rtol=1e-7, atol=1e-9, msg=name)
            assert torch.equal(found[name]["s"], results[0][name]["s"]), "ranks hold the same bits"
    for found in results:
        for kind, value in found["step"].items():
            torch.testing.assert_close(found["round"][kind], value, rtol=0, atol=1e-10, msg=kind)


STEPS = 14
SHARED = RoundConfig(k=4, sync="round", freeze_at=0.7, outer_momentum=0.5)
KINDS = {
    "turns": SHARED,
    "every_step": dataclasses.replace(SHARED, reference="every_step", subnets="references"),
    "per_rank": dataclasses.replace(SHARED, subnets="per_rank"),
}


def session_of(kind: str, **setup: Any) -> SparseOffload:
    """Adam, BatchNorm, a moving average, and the choice of a final mask."""
    final = configured(FinalConfig, candidates=4, selection_batches=2)
    adam = OptimConfig(name="adamw", lr=1e-2)
    return make_session(
        small_net(), BERNOULLI, KINDS[kind], STEPS, optimizer=adam, final=final, ema=0.5, **setup
    )


def own_batches() -> list[Any]:
    return [loss_of(own_part(batch)) for batch in batches(STEPS)]


def resumed(kind: str) -> list[str]:
    """What is not the same bits after a session has been saved and restored, between and within rounds."""
    straight = session_of(kind)
    for closure in own_batches():
        straight.step(closure)
    expected, wrong = state_of(straight), []
    for cut in (0, 2, 4, 6, 11, 13) if kind == "turns" else (6, 9):
        first, second = session_of(kind), session_of(kind)
        for closure in own_batches()[:cut]:
            first.step(closure)
        first.records()
        state = session_state(first)
        restore_session(second, copy.deepcopy(state))
        second.remember(own_batches()[max(0, cut - 2) : cut])
        for closure in own_batches()[cut:]:
            second.step(closure)
        found = state_of(second)
        wrong += [f"{n}, cut after {cut}" for n in expected if not torch.equal(found[n], expected[n])]
    return wrong


def resharded(folder: str) -> dict[str, Any]:
    """Goes on with the state that is there, for one round, and leaves its own."""
    session = session_of("turns")
    path = Path(folder) / "state"
    if path.exists():
        state = torch.load(path, weights_only=False)
        session.load_state_dict(state if session.ranks.rank == 0 else {"rows": {}, "small": state["small"]})
    found = {"loaded": state_of(session)}
    for closure in own_batches()[session.steps_done : session.steps_done + 4]:
        session.step(closure)
    state = session.state_dict()
    found["saved"] = state_of(session)
    if dist.is_initialized():
        dist.barrier()
    if session.ranks.rank == 0:
        torch.save(state, path)
    return found


def faulty(mode: str) -> tuple[dict[str, Any], list[str]]:
    """Rank 1 has a batch that is not finite."""
    session = make_session(small_net(), BERNOULLI, RoundConfig(k=3, sync="round"), on_nonfinite=mode)
    closures = own_batches()[:9]
    if dist.get_rank() == 1:
        x, y = batches(1)[0]
        closures[4] = loss_of((torch.full_like(x, torch.nan), y))
    for closure in closures:
        session.step(closure)
    faults = [record.fault for record in session.records() if record.fault]
    return state_of(session) | {"steps": session.steps_done}, faults


def uneven() -> dict[str, Any]:
    """K = 1, and rank 1 has fewer batches: as if ranks talked at every step."""
    found = {}
    for sync in ("step", "round"):
        rounds = RoundConfig(k=1, sync=sync, reference="every_step", freeze_at=1.0)  # type: ignore[arg-type]
        session = make_session(small_net(), BERNOULLI, rounds, optimizer=PLAIN)
        for closure in own_batches()[: 5 - 2 * dist.get_rank()]:
            session.step(closure)
        with session.evaluation() as network:
            found[f"{sync} network"] = torch.cat([p.detach().flatten() for p in network.parameters()])
        found[sync] = state_of(session)
    return found


def within_a_round() -> torch.Tensor:
    session = session_of("turns")
    for closure in own_batches()[:3]:
        session.step(closure)
    with session.evaluation() as network:
        return torch.cat([p.detach().flatten() for p in network.parameters()])


def per_node(shard: str) -> dict[str, Any]:
    """Four ranks, two to a node, as far as the launcher's variables say."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = {}
    for kind in ("turns", "per_rank"):
        session = session_of(kind, store=StoreConfig(shard=shard))  # type: ignore[arg-type]
        for closure in own_batches()[:8]:
            session.step(closure)
        found |= {f"{kind} {name}": value for name, value in state_of(session).items()}
    return found


def warmed_up() -> list[bool]:
    """Whether a round was local, for each of them."""
    session = session_of("per_rank", local_from=6)
    found = []
    for closure in own_batches():
        session.step(closure)
        found += [session.local] if session.round_step == 1 else []
    state_of(session)
    return found


def everything(folder: str) -> dict[str, Any]:
    """On two ranks: one start of the processes for all of it."""
    return {
        "resumed": {kind: resumed(kind) for kind in KINDS},
        "resharded": resharded(folder),
        "skip": faulty("skip"),
        "rollback": faulty("rollback"),
        "uneven": uneven(),
        "within": within_a_round(),
        "warmed_up": warmed_up(),
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = str(tmp_path_factory.mktemp("resharded"))
    return run_ranks(2, everything, folder, limit=300.0), folder


OnTwo = tuple[list[dict[str, Any]], str]


def test_a_session_restored_at_any_step_ends_with_the_same_bits(on_two: OnTwo) -> None:
    """Invariant 8: in the middle of a round every rank gets back what it has learned by itself."""
    for found in on_two[0]:
        assert found["resumed"] == {kind: [] for kind in KINDS}


def test_a_state_of_two_ranks_is_loaded_by_one_and_three(on_two: OnTwo) -> None:
    """Invariant 9, at the end of a round: the same store bit for bit, with the outer momentum."""
    results, folder = on_two
    saved = results[0]["resharded"]["saved"]
    for world_size in (1, 3):
        found = run_ranks(world_size, resharded, folder)
        for rank in found:
            for name, value in saved.items():
                assert torch.equal(rank["loaded"][name], value), (world_size, name)
        saved = found[0]["saved"]


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_a_batch_that_is_not_finite_on_one_rank_moves_nothing_on_any(on_two: OnTwo, mode: str) -> None:
    """It is named on both ranks, and a rollback takes both back."""
    (one, faults), (other, _) = (found[mode] for found in on_two[0])
    assert "step 4" in faults[0]
    assert "rank 1" in faults[0]
    assert one["steps"] == other["steps"] == 9
    for name in (WEIGHTS, "momentum_buffer", BUFFERS, "s"):
        assert torch.equal(one[name], other[name])
        assert bool(one[name].isfinite().all())


def test_a_rank_counts_by_the_steps_that_it_had_a_batch_for(on_two: OnTwo) -> None:
    for found in on_two[0]:
        step, local = found["uneven"]["step"], found["uneven"]["round"]
        for name in (WEIGHTS, "s"):
            torch.testing.assert_close(local[name], step[name], rtol=0, atol=1e-10, msg=name)
        one, other = (found["uneven"][f"{sync} network"] for sync in ("step", "round"))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_an_evaluation_within_a_round_is_of_the_mean_of_the_ranks(on_two: OnTwo) -> None:
    one, other = on_two[0]
    assert torch.equal(one["within"], other["within"])


def test_ranks_talk_at_every_step_of_the_warm_up(on_two: OnTwo) -> None:
    for found in on_two[0]:
        assert found["warmed_up"] == [False, False, True, True]


def test_a_store_per_node_averages_the_same() -> None:
    """Every node has an owner of each row, and all of them the same bits."""
    spread, by_node = run_ranks(4, per_node, "world"), run_ranks(4, per_node, "node")
    for found in by_node:
        for name, value in spread[0].items():
            assert torch.equal(found[name], value), name


def gone(*_: object) -> list[Any]:
    raise RuntimeError("this rank is no more")


def left_alone() -> tuple[bool, float]:
    """Rank 1 is not there at the end of a round."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    session = make_session(small_net(), BERNOULLI, RoundConfig(k=2, sync="round"))
    begun, failed = time.monotonic(), False
    if dist.get_rank():
        session.averaging.agreed = gone  # type: ignore[method-assign]
    try:
        for closure in own_batches()[:3]:
            session.step(closure)
    except RuntimeError:
        failed = True
    seconds = time.monotonic() - begun
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
    return failed, seconds


def test_a_rank_that_is_dead_is_given_up() -> None:
    (failed, seconds), _ = run_ranks(2, left_alone)
    assert failed
    assert seconds < 60
