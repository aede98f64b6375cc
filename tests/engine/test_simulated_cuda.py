"""Sessions on a simulated CUDA device: the bits of the CPU, no wait inside a step, few uploads per round."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload_sparse.engine.batch_norm import reestimate_batch_norm
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import StoreConfig
from tests.support.ranks import run_ranks
from tests.support.residual_nets import ResidualNet
from tests.support.sessions import arrays, assert_same, batches, loss_of, make_session, own_part, small_net
from tests.support.simulated_cuda import DEVICE, Simulation, simulated_cuda

POLICY = PolicyConfig.paper(rho=0.5, lr=0.05)
K = 4
STEPS = 4 * K

UPLOADS_PER_ROUND = {"zero_copy": 9, "staged": 15, "unpinned": 15, "no_triton": 21, "neither": 21}
"""Most uploads of a round: the tables of what is carried over in one, of what both subnets share in one, of
what is fetched and returned in one each (weights and statistics of two subnets); runs that are staged; and,
without the kernel, the numbers of every plan by themselves.
"""

REDUCTION = {"_foreach_copy_": 1, "sum": 1, "clone": 1}
"""Gradients and losses into one buffer, their sum behind them, and the losses to be read later."""

ACROSS_RANKS = {"all_reduce": 1, "div_": 1, "div": 1}

NOT_FINITE = {"dot": 1, "ne": 1, "_to_copy": 1, "clone": 1, "where": 1}
"""Whether a loss or gradient is, and the statistics of before if so."""

OPTIMIZERS = {
    "sgd": {"_fused_sgd_": 1, "copy_blocks": 3},
    "adamw": {"_fused_adamw_": 1, "_foreach_add_": 1, "_foreach_sub_": 1, "copy_blocks": 4},
}
"""The step, and shared entries to the other subnet: of weights, slots and statistics."""

MOST_OPERATIONS = 15
"""Of a step, beyond the passes of its two networks."""

WAYS = {
    "zero_copy": {},
    "staged": {"zero_copy": False},
    "unpinned": {"pinned": False, "zero_copy": False},
    "no_triton": {"triton": False},
    "neither": {"triton": False, "pinned": False},
}

QUICK = {"overlap": tuple(WAYS), "full": ("staged", "neither"), "delta": ("zero_copy", "no_triton")}
MOVES = [
    pytest.param(transfer, way, marks=() if way in quick else pytest.mark.slow)
    for transfer, quick in QUICK.items()
    for way in WAYS
]
"""By default every way of copying beside the steps, and some of those between rounds."""


def on_device(data: list[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in data]


def trained(make: Any, device: torch.device, steps: int = STEPS) -> tuple[SparseOffload, dict[str, Tensor]]:
    """A session after so many steps on a device, and what its store then holds (with s)."""
    session = make(device=device)
    for batch in on_device(batches(steps), device):
        session.step(loss_of(batch))
    found = arrays(session) | {"s": session.policy.s.clone()}
    session.transfers.close()
    return session, found


def watched(
    session: SparseOffload, sim: Simulation, data: list[tuple[Tensor, Tensor]]
) -> list[tuple[list[Any], list[Any], Counter[str]]]:
    """Per step: what the main thread waited for, every upload of the main thread, all operations."""
    seen = []
    for batch in data:
        waits, uploads, operations = len(sim.waits), len(sim.uploads), Counter(sim.operations)
        session.step(loss_of(batch))
        of_main = [wait for wait in sim.waits[waits:] if wait[-1] == "MainThread"]
        sent = [upload for upload in sim.uploads[uploads:] if upload[-1] == "MainThread"]
        seen.append((of_main, sent, Counter(sim.operations) - operations))
    return seen


@dataclass(frozen=True)
class Ran:
    """A session on the simulated device, twice over the same batches.

    Attributes:
        steps: as ``watched`` gives them, of the first time.
        uploads: threads of all uploads of the first time, with what was fetched ahead at its end.
        again: lines of the uploads of the main thread the second time.
        wrong_device: as in ``Simulation``.
        found: the store and s at the end.
    """

    steps: list[tuple[list[Any], list[Any], Counter[str]]]
    uploads: list[str]
    again: list[str]
    wrong_device: list[str]
    found: dict[str, Tensor]


def rounds_of(transfer: Any, device: torch.device) -> SparseOffload:
    return make_session(small_net(), POLICY, RoundConfig(k=K, transfer=transfer), device=device)


@cache
def on_the_cpu(transfer: str) -> dict[str, Tensor]:
    session = rounds_of(transfer, torch.device("cpu"))
    for batch in batches(STEPS) * 2:
        session.step(loss_of(batch))
    found = arrays(session) | {"s": session.policy.s.clone()}
    session.transfers.close()
    return found


@cache
def ran(transfer: str, way: str) -> Ran:
    with simulated_cuda(**WAYS[way]) as sim:
        session = rounds_of(transfer, DEVICE)
        data = on_device(batches(STEPS), DEVICE)
        sim.uploads.clear()
        steps = watched(session, sim, data)
        session.transfers.join()
        uploads = [thread for _, thread in sim.uploads]
        sim.uploads.clear()
        for batch in data:
            session.step(loss_of(batch))
        again = [line for line, thread in sim.uploads if thread == "MainThread"]
        found = arrays(session) | {"s": session.policy.s.clone()}
        session.transfers.close()
    return Ran(steps, uploads, again, sim.wrong_device, found)


@pytest.mark.parametrize(("transfer", "way"), MOVES)
def test_every_way_of_moving_weights_ends_with_the_bits_of_the_cpu(transfer: str, way: str) -> None:
    assert_same(ran(transfer, way).found, on_the_cpu(transfer))
    assert ran(transfer, way).wrong_device == []


@pytest.mark.parametrize(
    ("reference", "optimizer"),
    [
        *(("every_step", "sgd"), ("turns", "sgd"), ("round_start", "sgd"), ("turns", "adamw")),
        *(pytest.param(name, "adamw", marks=pytest.mark.slow) for name in ("every_step", "round_start")),
    ],
)
def test_every_schedule_and_optimizer_ends_with_the_bits_of_the_cpu(reference: Any, optimizer: Any) -> None:
    rounds = RoundConfig(k=K, reference=reference, freeze_at=0.7, transfer="overlap")
    optim = OptimConfig(name=optimizer, lr=0.01, clip_norm=1.0)
    make = partial(make_session, small_net(), POLICY, rounds, STEPS, optimizer=optim)
    expected = trained(make, torch.device("cpu"))[1]
    with simulated_cuda():
        assert_same(trained(make, DEVICE)[1], expected)


@pytest.mark.parametrize("residual", ["coupled", "internal", "filter"])
def test_every_residual_policy_ends_with_the_bits_of_the_cpu(residual: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = ResidualNet().double()
    make = partial(make_session, net, POLICY, RoundConfig(k=K, transfer="overlap"), residual=residual)
    expected = trained(make, torch.device("cpu"))[1]
    with simulated_cuda():
        assert_same(trained(make, DEVICE)[1], expected)


def test_weights_of_16_bits_end_with_the_bits_of_the_cpu() -> None:
    def run(device: torch.device) -> dict[str, Tensor]:
        rounds = RoundConfig(k=K, transfer="overlap")
        session = make_session(small_net(), POLICY, rounds, device=device, dtype=torch.bfloat16)
        for x, y in batches(STEPS):
            session.step(loss_of((x.bfloat16().to(device), y.to(device))))
        found = arrays(session) | {"s": session.policy.s.clone()}
        session.transfers.close()
        return found

    expected = run(torch.device("cpu"))
    with simulated_cuda():
        assert_same(run(DEVICE), expected)


@pytest.mark.parametrize("tier", ["file", "nvme"])
def test_a_store_in_files_ends_with_the_bits_of_the_cpu(tmp_path: Path, tier: Any) -> None:
    """Files are never page-locked: rows are staged."""

    def make(device: torch.device) -> SparseOffload:
        store = StoreConfig(tier, str(tmp_path / device.type))
        rounds = RoundConfig(k=K, transfer="overlap")
        return make_session(small_net(), POLICY, rounds, store=store, device=device)

    expected = trained(make, torch.device("cpu"))[1]
    with simulated_cuda():
        assert_same(trained(make, DEVICE)[1], expected)


@pytest.mark.parametrize(("transfer", "way"), MOVES)
def test_nothing_in_a_step_waits_for_the_device_or_sends_to_it(transfer: str, way: str) -> None:
    """Rounds begin and end with waits (s is learned on the host); the steps between have none."""
    for number, (waits, sent, _) in enumerate(ran(transfer, way).steps):
        if number % K not in (0, K - 1):
            assert (waits, sent) == ([], []), f"step {number}"


@pytest.mark.parametrize(("transfer", "way"), MOVES)
def test_a_round_sends_few_tables(transfer: str, way: str) -> None:
    """With overlap none of them from the main thread."""
    found = ran(transfer, way)
    rounds = STEPS // K + (transfer == "overlap")  # one more is fetched ahead
    assert len(found.uploads) <= UPLOADS_PER_ROUND[way] * rounds
    if transfer == "overlap":
        assert "MainThread" in found.uploads, "the first round has nothing that was fetched ahead"
        assert found.again == []


def beyond_the_networks(net: nn.Module, optimizer: str) -> Counter[str]:
    """Operations of a step less those of its plain networks: one trained, with fresh gradients, and one
    evaluated, without a trace in its statistics.
    """
    with simulated_cuda() as sim:
        optim = OptimConfig(name=optimizer, lr=0.01)  # type: ignore[arg-type]
        rounds = RoundConfig(k=K, transfer="delta")
        session = make_session(net, POLICY, rounds, optimizer=optim, device=DEVICE)
        step = watched(session, sim, on_device(batches(2), DEVICE))[1][2]
        session._open()
        closure = loss_of(on_device(batches(1), DEVICE)[0])
        first, second = session.transfers.pair.sides
        first.module.zero_grad(set_to_none=True)
        sim.operations.clear()
        with torch.no_grad(), second.buffers_untouched():
            closure(second.module)
        closure(first.module).backward()
        assert sim.operations <= step
        session.transfers.close()
        return step - sim.operations


@pytest.mark.parametrize("net", ["shallow", "deep"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_gives_the_device_these_operations_beyond_its_networks(optimizer: str, net: str) -> None:
    """However many tensors the network has."""
    found = beyond_the_networks(small_net() if net == "shallow" else ResidualNet().double(), optimizer)
    assert found == Counter(REDUCTION) + Counter(NOT_FINITE) + Counter(OPTIMIZERS[optimizer])
    assert found.total() <= MOST_OPERATIONS


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("reference", ["every_step", "round_start"])
def test_a_batch_on_another_device_is_one_error_that_names_both(reference: Any, part: str) -> None:
    """In the pass that is evaluated and in the one that is trained; the right batch then goes on."""
    with simulated_cuda():
        rounds = RoundConfig(k=K, reference=reference)
        session = make_session(small_net(), POLICY, rounds, device=DEVICE)
        for x, y in batches(2):
            right = x.to(DEVICE), y.to(DEVICE)
            wrong = (x, right[1]) if part == "images" else (right[0], y)
            with pytest.raises(ValueError, match=r"the session is on cuda:1, .* on cpu; move the batch"):
                session.step(loss_of(wrong))
            assert session.step(loss_of(right)).device == DEVICE
        session.transfers.close()


def test_metrics_of_the_host_do_not_make_a_step_wait() -> None:
    with simulated_cuda() as sim:
        session = make_session(small_net(), POLICY, RoundConfig(k=K), device=DEVICE)
        for number, batch in enumerate(on_device(batches(K - 1), DEVICE)):
            before = len(sim.waits)
            session.step(lambda net, batch=batch: (loss_of(batch)(net), {"a": 2, "b": torch.tensor(0.5)}))
            assert number == 0 or "MainThread" not in [thread for *_, thread in sim.waits[before:]]
        assert [record.metrics for record in session.records()] == [{"a": 2.0, "b": 0.5}] * (K - 1)
        session.transfers.close()


def test_evaluation_final_network_and_resuming_equal_the_cpu() -> None:
    def run(device: torch.device) -> dict[str, Tensor]:
        make = partial(
            make_session, small_net(), POLICY, RoundConfig(k=K, freeze_at=0.5), STEPS, device=device
        )
        data = on_device(batches(STEPS), device)
        first = make()
        for batch in data[: K + 2]:
            first.step(loss_of(batch))
        second = make()
        second.load_state_dict(first.state_dict())
        for session in (first, second):
            session.transfers.join()
        first.transfers.close()
        for batch in data[K + 2 :]:
            second.step(loss_of(batch))
        images = [x for x, _ in data[:3]]
        with second.evaluation(images) as module:
            logits = module(images[0])
        network = second.finalize(images)
        found = {"logits": logits, "final": network.module(images[0]), **network.module.state_dict()}
        return {name: value.detach().to("cpu") for name, value in found.items()}

    expected = run(torch.device("cpu"))
    with simulated_cuda():
        assert_same(run(DEVICE), expected)


def test_passes_are_compiled_to_graphs_once_their_subnet_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled stays eager here: a simulated device has no code."""
    modes: list[tuple[int, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic, mode: modes.append((len(seen), mode)))
    seen: list[int] = []
    rounds = RoundConfig(k=K, freeze_at=0.5, transfer="full")
    with simulated_cuda():
        session = make_session(small_net(), PolicyConfig(rho=0.5), rounds, STEPS, device=DEVICE, compile=True)
        for step, batch in enumerate(on_device(batches(STEPS), DEVICE)):
            seen.append(step)
            session.step(loss_of(batch))
        session.transfers.close()
    assert {mode for step, mode in modes if step == 0} == {None}
    later = [(step, mode) for step, mode in modes if step]
    assert len(later) == len(modes) // 2, "every subnet once"
    assert set(later) == {(STEPS // 2 + 1, "reduce-overhead")}


def test_statistics_are_estimated_anew_as_by_torch_with_a_wait_per_batch() -> None:
    """Also those of a norm that a network calls twice. The wait tells whether the batch is finite."""
    norm, data = nn.BatchNorm2d(3, affine=False), [torch.randn(4, 3, 5, 5) + number for number in range(3)]
    plain = nn.Sequential(norm, nn.ReLU(), norm)
    with simulated_cuda() as sim:
        there, there_too = copy.deepcopy(plain).to(DEVICE), [x.to(DEVICE) for x in data]
        before = len(sim.waits)
        reestimate_batch_norm(there, there_too)
        assert len(sim.waits[before:]) == len(data)
        found = {name: value.to("cpu") for name, value in there.state_dict().items()}
    norm.momentum = None  # a cumulative average
    for x in data:
        plain(x)
    assert_same(found, plain.state_dict())
    assert there[0].momentum == 0.1


# --- two ranks ---


def ended(simulated: bool, subnets: str, transfer: str) -> dict[str, Tensor]:
    """What one of two ranks ends with, its groups like NCCL's if the device is simulated."""

    def make(device: torch.device) -> dict[str, Tensor]:
        reference = "turns" if subnets == "shared" else "every_step"
        rounds = RoundConfig(
            k=K,
            subnets=subnets,  # type: ignore[arg-type]
            reference=reference,  # type: ignore[arg-type]
            transfer=transfer,  # type: ignore[arg-type]
        )
        policy = POLICY if subnets == "shared" else PolicyConfig.paper(rho=0.5, estimator="rloo")
        session = make_session(small_net(), policy, rounds, device=device)
        for batch in on_device([own_part(batch) for batch in batches(STEPS)], device):
            session.step(loss_of(batch))
        found = arrays(session) | {"s": session.policy.s.clone()}
        session.transfers.close()
        return found

    if not simulated:
        return make(torch.device("cpu"))
    with simulated_cuda():
        return make(DEVICE)


def refused() -> str:
    """What a rank says where the second one's memory cannot be page-locked."""
    with simulated_cuda(pinned=dist.get_rank() == 0):
        try:
            store = StoreConfig(pin="on")
            make_session(small_net(), POLICY, RoundConfig(k=K), device=DEVICE, store=store)
        except ValueError as error:
            return str(error)
    return "nothing"


def collectives(mixed: bool) -> str:
    with simulated_cuda():
        gloo = dist.new_group([0, 1], backend="gloo")
        host, here = torch.ones(2), torch.ones(2, device=DEVICE)
        dist.all_reduce(here)
        dist.all_reduce(host, group=gloo)
        try:
            if mixed:
                dist.all_reduce(host)
            else:
                dist.all_reduce(here, group=gloo)
        except RuntimeError as error:
            return f"{error} {here.to('cpu').tolist()} {host.tolist()}"
    return "nothing was refused"


TOGETHER = [("shared", "overlap"), ("references", "overlap"), ("shared", "full")]


def everything() -> dict[str, Any]:
    """On two ranks: one start of the processes for all of it."""
    return {
        "ended": {case: [ended(simulated, *case) for simulated in (False, True)] for case in TOGETHER},
        "operations": beyond_the_networks(small_net(), "sgd"),
        "refused": refused(),
        "collectives": {mixed: collectives(mixed) for mixed in (True, False)},
    }


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return run_ranks(2, everything)


@pytest.mark.parametrize("case", TOGETHER, ids="-".join)
def test_two_ranks_give_their_groups_what_nccl_takes(
    on_two: list[dict[str, Any]], case: tuple[str, str]
) -> None:
    for found in on_two:
        expected, simulated = found["ended"][case]
        assert_same(simulated, expected)


def test_ranks_add_one_reduction_and_its_divisions(on_two: list[dict[str, Any]]) -> None:
    expected = Counter(REDUCTION) + Counter(ACROSS_RANKS) + Counter(NOT_FINITE) + Counter(OPTIMIZERS["sgd"])
    assert [found["operations"] for found in on_two] == [expected] * 2
    assert expected.total() <= MOST_OPERATIONS


def test_memory_that_one_rank_cannot_page_lock_is_an_error_on_both(on_two: list[dict[str, Any]]) -> None:
    for found in on_two:
        assert found["refused"].startswith("rank 1: CUDA could not page-lock")
        assert found["refused"].endswith("set store.pin to off")


# --- the simulation itself ---


def test_the_simulation_refuses_mixed_devices() -> None:
    """It also notes waits and uploads."""
    with simulated_cuda() as sim:
        here = torch.arange(6.0).to(DEVICE)
        assert (len(sim.uploads), len(sim.waits)) == (1, 1)
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.ones(6)
        sim.waits.clear()
        here += 1
        here[:1] = 5.0
        assert sim.waits == []
        assert here.sum().item() == 25.0
        assert torch.equal(here.to("cpu")[1:], torch.arange(2.0, 7.0))
        here[torch.tensor([1, 2])]
        here[torch.zeros(1, dtype=torch.int64, device=DEVICE)] = 6.0
        here[0] = 5.0
        waits = ["_local_scalar_dense", "download", "an index on the CPU", "a number", "a number"]
        assert [what for what, *_ in sim.waits] == waits
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()


def test_the_simulation_sees_a_stream_that_did_not_wait() -> None:
    with simulated_cuda():
        stream, values = torch.cuda.Stream(DEVICE), torch.zeros(4, device=DEVICE)
        with torch.cuda.stream(stream), pytest.raises(RuntimeError, match="has not waited"):
            values + 1
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values.fill_(2.0)
        with pytest.raises(RuntimeError, match="has not waited"):
            values + 1
        torch.cuda.current_stream().wait_event(stream.record_event())
        assert torch.equal((values + 1).to("cpu"), torch.full((4,), 3.0))


@pytest.mark.parametrize(("mixed", "said"), [(True, "NCCL group was given a CPU"), (False, "gloo group was")])
def test_simulated_groups_refuse_what_their_backends_refuse(
    on_two: list[dict[str, Any]], mixed: bool, said: str
) -> None:
    for found in on_two:
        answer = found["collectives"][mixed]
        assert said in answer
        assert answer.endswith("[2.0, 2.0] [2.0, 2.0]")
