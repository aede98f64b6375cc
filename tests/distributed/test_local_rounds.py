"""Ranks that talk once per round: against local SGD on the full weights, and what holds of them besides."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from offload_sparse.bench.plan import build_session
from offload_sparse.engine.config import FinalConfig, OptimConfig, RoundConfig, Subnets, Transfer
from offload_sparse.engine.durable import DurableRounds
from offload_sparse.engine.forward import Closure
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import restore_session, session_state
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.plan.plan import Planner
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.tiers import Mode
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS
from offload_sparse.workloads.data.loader import declared_data
from tests.engine.reference import LocalTrainer
from tests.support.channel_maps import small_map
from tests.support.constants import configured
from tests.support.planned_runs import CASES as PLANNED
from tests.support.planned_runs import train
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
OUTER_STEP = {"k": 2, "outer": [0.7, 0.6]}

LOCAL = RoundConfig(k=3, sync="round", freeze_at=1.0)
CASES: dict[str, tuple[RoundConfig, PolicyConfig]] = {
    "turns": (dataclasses.replace(LOCAL, k=4), BERNOULLI),
    "turns, persistent": (LOCAL, PERSISTENT),
    "every_step": (dataclasses.replace(LOCAL, reference="every_step", prefetch=False), BERNOULLI),
    "every_step, persistent": (dataclasses.replace(LOCAL, k=1, reference="every_step"), PERSISTENT),
    "round_start": (dataclasses.replace(LOCAL, k=2, reference="round_start"), BERNOULLI),
    "references": (dataclasses.replace(LOCAL, reference="every_step", subnets="references"), BERNOULLI),
    "outer": (RoundConfig(**(vars(LOCAL) | OUTER_STEP)), BERNOULLI),
    "per_rank": (dataclasses.replace(LOCAL, subnets="per_rank", prefetch=False), BERNOULLI),
    "per_rank, persistent": (dataclasses.replace(LOCAL, subnets="per_rank"), PERSISTENT),
    "partition": (dataclasses.replace(LOCAL, subnets="partition", outer=[1.0, 0.5]), BERNOULLI),
}


def state_of(session: SparseOffload) -> dict[str, torch.Tensor]:
    session.settle()
    found = {k: whole(session.store, k) for k in (WEIGHTS, *session.store.slots, BUFFERS)}
    return found | {"s": session.policy.s.clone()}


def trained(optimizer: OptimConfig, rounds: RoundConfig, policy: PolicyConfig, steps: int) -> Any:
    session = make_session(small_net(), policy, rounds, optimizer=optimizer)
    session.check_ranks = True
    for batch in batches(steps, size=12):
        session.step(loss_of(own_part(batch)))
    return state_of(session)


def local_rounds(number: int) -> dict[str, Any]:
    """Rounds of every case; and K = 1 without momentum, of both ways to talk and both samplers."""
    found = {name: trained(OPTIM, *case, number * case[0].k) for name, case in CASES.items()}
    for policy in (BERNOULLI, PERSISTENT):
        for sync in ("step", "round"):
            rounds = RoundConfig(k=1, sync=sync, reference="every_step", freeze_at=1.0)  # type: ignore[arg-type]
            found[f"{sync} {policy.sampler}"] = trained(PLAIN, rounds, policy, 5)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_local_rounds_are_local_sgd_on_the_full_weights(world_size: int) -> None:
    """Weights, momentum, statistics and s; with K = 1 and SGD the same as if ranks talked at every step."""
    number = 3 if world_size == 2 else 2
    results = run_ranks(world_size, local_rounds, number)
    net = small_net()
    for name, (rounds, policy) in CASES.items():
        expected = LocalTrainer(net, small_map(net), policy, rounds, OPTIM, seed=3)
        expected.train(batches(number * rounds.k, size=12), world_size)
        kinds = {"momentum_buffer": expected.momentum, WEIGHTS: expected.weights, BUFFERS: expected.buffers}
        flat = {kind: torch.cat([v.flatten() for v in values.values()]) for kind, values in kinds.items()}
        for found in results:
            for kind, value in flat.items():
                torch.testing.assert_close(
                    found[name][kind], value, rtol=1e-9, atol=1e-11, msg=f"{name} {kind}"
                )
            torch.testing.assert_close(found[name]["s"], expected.policy.s, rtol=1e-7, atol=1e-9, msg=name)
            assert torch.equal(found[name]["s"], results[0][name]["s"]), "ranks hold the same bits"
    for found in results:
        for sampler in ("bernoulli", "persistent"):
            for kind, value in found[f"step {sampler}"].items():
                once = found[f"round {sampler}"][kind]
                torch.testing.assert_close(once, value, rtol=0, atol=1e-10, msg=f"{sampler} {kind}")


STEPS = 14
SHARED = RoundConfig(k=4, sync="round", freeze_at=0.7, outer=[1.0, 0.5])
KINDS = {
    "turns": SHARED,
    "every_step": dataclasses.replace(SHARED, reference="every_step", subnets="references"),
    "per_rank": dataclasses.replace(SHARED, subnets="per_rank"),
}


def session_of(kind: str, transfer: Transfer = "auto", **setup: Any) -> SparseOffload:
    """Adam, BatchNorm, a moving average, and the choice of a final mask."""
    final = configured(FinalConfig, candidates=4, selection_batches=2)
    adam = OptimConfig(name="adamw", lr=1e-2)
    rounds = dataclasses.replace(KINDS[kind], transfer=transfer)
    return make_session(small_net(), BERNOULLI, rounds, STEPS, optimizer=adam, final=final, ema=0.5, **setup)


def own_batches() -> list[Any]:
    return [loss_of(own_part(batch)) for batch in batches(STEPS)]


def fetched_ahead(kind: str) -> dict[str, Any]:
    """Beside the steps and between the rounds, after a first round in which ranks talk at every step: what is
    not the same bits, and the bytes that have left the rows after every step.
    """
    found, counted = [], []
    for transfer in ("overlap", "full"):
        session = session_of(kind, transfer, local_from=4)
        bytes_fetched = []
        for closure in own_batches():
            session.step(closure)
            session.transfers.join()
            bytes_fetched.append(session.transfers.bytes_fetched)
        found.append(state_of(session))
        counted.append(bytes_fetched)
    beside, between = found
    return {"wrong": [n for n in beside if not torch.equal(beside[n], between[n])], "bytes": counted}


def resumed(kind: str) -> list[str]:
    """What is not the same bits after a session has been saved and restored, between and within rounds."""
    straight = session_of(kind)
    for closure in own_batches():
        straight.step(closure)
    expected, wrong = state_of(straight), []
    first, states = session_of(kind), {}
    for step, closure in enumerate(own_batches()):
        if step in ((0, 2, 4, 6, 11, 13) if kind == "turns" else (6, 9)):
            first.records()
            states[step] = copy.deepcopy(session_state(first))
        first.step(closure)
    for cut, state in states.items():
        second = session_of(kind)
        restore_session(second, state)
        second.remember(own_batches()[max(0, cut - 2) : cut])
        for closure in own_batches()[cut:]:
            second.step(closure)
        found = state_of(second)
        wrong += [f"{n}, cut after {cut}" for n in expected if not torch.equal(found[n], expected[n])]
    return wrong


def resharded(folder: str, kind: str) -> dict[str, Any]:
    """Goes on with the state that is there, for one round, and leaves its own."""
    session = session_of(kind)
    session.check_ranks = True
    path = Path(folder) / kind
    if path.exists():
        state = torch.load(path, weights_only=False)
        session.load_state_dict(state if session.ranks.rank == 0 else {"rows": {}, "small": state["small"]})
    found = {"loaded": state_of(session)}
    for closure in own_batches()[session.steps_done : session.steps_done + 4]:
        session.step(closure)
        found.setdefault("masks", len(session.masks or ()))
    state = session.state_dict()
    found["saved"] = state_of(session)
    if dist.is_initialized():
        dist.barrier()
    if session.ranks.rank == 0:
        torch.save(state, path)
    return found


def faulty(mode: str, subnets: Subnets) -> tuple[dict[str, Any], list[str]]:
    """Rank 1 has a batch that is not finite."""
    rounds = RoundConfig(k=3, sync="round", subnets=subnets)
    session = make_session(small_net(), BERNOULLI, rounds, on_nonfinite=mode)
    closures = own_batches()[:9]
    if dist.get_rank() == 1:
        x, y = batches(1)[0]
        closures[4] = loss_of((torch.full_like(x, torch.nan), y))
    for closure in closures:
        session.step(closure)
    faults = [record.fault for record in session.records() if record.fault]
    return state_of(session) | {"steps": session.steps_done}, faults


FAULTY: list[tuple[str, Subnets]] = [
    (mode, subnets) for mode in ("skip", "rollback") for subnets in ("shared", "per_rank")
]


def with_rank(network: torch.nn.Module, closure: Closure) -> tuple[torch.Tensor, dict[str, float]]:
    """A metric that differs from rank to rank."""
    return cast(torch.Tensor, closure(network)), {"rank": dist.get_rank()}


def uneven() -> dict[str, Any]:
    """K = 1, and rank 1 has fewer batches: as if ranks talked at every step."""
    found = {}
    for sync in ("step", "round"):
        rounds = RoundConfig(k=1, sync=sync, reference="every_step", freeze_at=1.0)  # type: ignore[arg-type]
        session = make_session(small_net(), BERNOULLI, rounds, optimizer=PLAIN)
        for closure in own_batches()[: 5 - 2 * dist.get_rank()]:
            session.step(partial(with_rank, closure=closure))
        found[f"{sync} records"] = session.records()
        with session.evaluation() as network:
            found[f"{sync} network"] = torch.cat([p.detach().flatten() for p in network.parameters()])
        found[sync] = state_of(session)
    return found


def within_a_round(kind: str) -> torch.Tensor:
    """Weights in an evaluation; of subnets of every rank's own their statistics."""
    session = session_of(kind)
    for closure in own_batches()[:3]:
        session.step(closure)
    with session.evaluation() as network:
        tensors = network.buffers() if kind == "per_rank" else network.parameters()
        return torch.cat([t.detach().double().flatten() for t in tensors])


def per_node() -> list[dict[str, Any]]:
    """Four ranks, two to a node, as far as the launcher's variables say."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return [with_a_store(shard) for shard in ("world", "node")]


def with_a_store(shard: str) -> dict[str, Any]:
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


class EverySecond(DurableRounds):
    settle_every = 2


def durable(folder: Path, kind: str) -> list[str]:
    """What is not the same bits after a process has ended without a word, on a store in files."""

    def opened(name: str, mode: Mode = "new") -> tuple[SparseOffload, DurableRounds]:
        store = StoreConfig("file", str(folder / name))
        session = session_of(kind, store=store, run_id="test", store_mode=mode)
        return session, EverySecond(session)

    closures, wrong = own_batches()[:8], []  # before the final mask, whose choice takes the last batches
    straight, _ = opened("straight")
    for closure in closures:
        straight.step(closure)
    expected = state_of(straight)
    for cut, saves in ((3, False), (4, False), (6, False), (6, True)):
        name = f"cut after {cut}{', saved' * saves}"
        first, log = opened(name)
        for closure in closures[:cut]:
            first.step(closure)
        if saves:
            log.save()
        second, again = opened(name, "resume")
        done = again.restore()
        assert done == (cut if saves else cut - cut % KINDS[kind].k)
        for closure in closures[done:]:
            second.step(closure)
        found = state_of(second)
        wrong += [f"{n}, {name}" for n in expected if not torch.equal(found[n], expected[n])]
    return wrong


def sent(subnets: str) -> tuple[float, float]:
    """Bytes that this rank sends between two rounds: counted, and planned."""
    local = PLANNED["local"]
    rounds = dataclasses.replace(local.round, reference="every_step", subnets=subnets, transfer="full")
    config = dataclasses.replace(local, round=rounds, data=dataclasses.replace(local.data, batch_size=8))
    session, fetched = build_session(config), []
    train(session, config, lambda: fetched.append(session.transfers.bytes_fetched))
    leaving = fetched[-1] - fetched[0]  # of which a subnet of one's own takes a half to this rank itself
    counted = session.averaging.bytes_sent / 2 + leaving / (2 if subnets == "per_rank" else 1)
    machine = Machine(2, 2, 1 << 50, None)
    planner = Planner.of(config, declared_data(config.data), machine)
    return counted, planner.sent(machine, rounds=2) * rounds.k


def everything(folder: str) -> dict[str, Any]:
    """On two ranks: one start of the processes for all of it."""
    return {
        "ahead": {kind: fetched_ahead(kind) for kind in ("turns", "every_step")},
        "resumed": {kind: resumed(kind) for kind in KINDS},
        "durable": {kind: durable(Path(folder) / f"files of {kind}", kind) for kind in ("turns", "per_rank")},
        "resharded": {kind: resharded(folder, kind) for kind in ("turns", "per_rank")},
        "sent": {kind: sent(kind) for kind in ("shared", "per_rank")},
        "faulty": {case: faulty(*case) for case in FAULTY},
        "uneven": uneven(),
        "within": {kind: within_a_round(kind) for kind in ("turns", "per_rank")},
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


def test_what_is_fetched_while_ranks_train_by_themselves_changes_no_bit(on_two: OnTwo) -> None:
    """What the open round trains comes at its end, as ranks agree on it; all else during its steps."""
    for kind in ("turns", "every_step"):
        for found in on_two[0]:
            assert found["ahead"][kind]["wrong"] == []
            beside, between = found["ahead"][kind]["bytes"]
            assert beside[-1] == between[-1]
        beside, between = (
            [sum(found["ahead"][kind]["bytes"][way][step] for found in on_two[0]) for step in range(STEPS)]
            for way in range(2)
        )
        opened = between[8] - between[7]
        assert between[4] < beside[4] < between[4] + opened, "in the first step of a round, most of the next"


def all_resharded(folder: str) -> dict[str, Any]:
    return {kind: resharded(folder, kind) for kind in ("turns", "per_rank")}


def test_a_state_of_two_ranks_is_loaded_by_one_and_three(on_two: OnTwo) -> None:
    """Invariant 9, at the end of a round: the same store bit for bit, with the outer momentum; where every
    rank has a subnet of its own, as many are drawn as there are ranks now.
    """
    results, folder = on_two
    before = results[0]["resharded"]
    for world_size in (1, 3):
        found = run_ranks(world_size, all_resharded, folder)
        for rank in found:
            for kind, saved in before.items():
                for name, value in saved["saved"].items():
                    assert torch.equal(rank[kind]["loaded"][name], value), (world_size, kind, name)
            assert rank["per_rank"]["masks"] == max(2, world_size)
        before = found[0]


def test_rounds_in_files_are_taken_up_with_the_same_bits(on_two: OnTwo) -> None:
    """After any step of a round: at the round's begin, or, where the step was saved, right there."""
    for found in on_two[0]:
        assert found["durable"] == {"turns": [], "per_rank": []}


@pytest.mark.parametrize("chosen", [{"transfer": "delta"}, {"transfer": "overlap", "subnets": "per_rank"}])
def test_what_ranks_change_alone_is_neither_kept_nor_fetched_ahead(chosen: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="to auto"):
        RoundConfig(sync="round", **chosen)


@pytest.mark.parametrize(("subnets", "apart"), [("shared", 1e-3), ("per_rank", 0.1)])
def test_the_plan_counts_the_bytes_that_ranks_send(on_two: OnTwo, subnets: str, apart: float) -> None:
    """At the end of a round and for the next one; subnets of their own count as large as the first."""
    (one, planned), (other, _) = (found["sent"][subnets] for found in on_two[0])
    assert (one + other) / 2 == pytest.approx(planned, rel=apart)


@pytest.mark.parametrize("case", FAULTY)
def test_a_batch_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    on_two: OnTwo, case: tuple[str, Subnets]
) -> None:
    """It is named on both ranks, and a rollback takes both back."""
    (one, faults), (other, _) = (found["faulty"][case] for found in on_two[0])
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


def test_losses_and_metrics_are_those_of_all_ranks(on_two: OnTwo) -> None:
    """Each in its mean over the ranks that had a batch: two for three steps, then one."""
    for found, expected in zip(on_two[0], ([0.5] * 3 + [0.0] * 2, [0.5] * 3), strict=True):
        step, local = found["uneven"]["step records"], found["uneven"]["round records"]
        assert [record.metrics["rank"] for record in local] == expected
        for one, other in zip(local, step, strict=True):
            assert one.metrics == other.metrics
            assert (one.loss, *one.compared) == pytest.approx((other.loss, *other.compared), abs=1e-10)


def test_an_evaluation_within_a_round_is_of_the_mean_of_the_ranks(on_two: OnTwo) -> None:
    one, other = (found["within"] for found in on_two[0])
    assert torch.equal(one["turns"], other["turns"])
    assert not torch.equal(one["per_rank"], other["per_rank"]), "statistics of other channels are no mean"


def test_ranks_talk_at_every_step_of_the_warm_up(on_two: OnTwo) -> None:
    for found in on_two[0]:
        assert found["warmed_up"] == [False, False, True, True]


def test_a_store_per_node_averages_the_same() -> None:
    """Every node has an owner of each row, and all of them the same bits."""
    spread, by_node = zip(*run_ranks(4, per_node), strict=True)
    for found in by_node:
        for name, value in spread[0].items():
            assert torch.equal(found[name], value), name


def left_alone() -> bool:
    """Rank 1 ends without a word at the end of a round."""
    session = make_session(small_net(), BERNOULLI, RoundConfig(k=2, sync="round"))
    if dist.get_rank():
        session.averaging.agreed = lambda *_: os._exit(0)  # type: ignore[method-assign]
    try:
        for closure in own_batches()[:3]:
            session.step(closure)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    return False


def test_a_rank_that_is_dead_is_an_error_on_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit codes \[3, 0\].*by peer"):
        run_ranks(2, left_alone, limit=100.0)
