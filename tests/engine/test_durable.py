"""A session on a store in files, stopped after any round, goes on to the result of one that was not."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.engine.config import OnNonFinite, RoundConfig
from offload_sparse.engine.durable import DurableRounds
from offload_sparse.engine.forward import Closure
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import StoreConfig
from tests.support.ranks import run_ranks

K, ROUNDS = 2, 4


class EveryRound(DurableRounds):
    settle_every = 1


class EveryThird(DurableRounds):
    settle_every = 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def session_of(
    folder: Path, mode: str = "new", tier: str = "file", on_nonfinite: OnNonFinite = "stop", **more: Any
) -> SparseOffload:
    return SparseOffload(
        network,
        (torch.empty(2, 6),),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        total_steps=K * ROUNDS,
        policy=PolicyConfig.paper(rho=0.5, lr=0.05),
        rounds=RoundConfig(k=K, freeze_at=1),
        setup=Setup(
            store=StoreConfig(tier, str(folder)),  # type: ignore[arg-type]
            run_id="test",
            store_mode=mode,  # type: ignore[arg-type]
            verify=False,
            on_nonfinite=on_nonfinite,
        ),
        device="cpu",
        **more,
    )


def test_other_groups_need_a_store_of_their_own_or_replace_it(tmp_path: Path) -> None:
    session_of(tmp_path)
    groups = lambda name: {"lr": 0.01} if name == "0.bias" else None  # noqa: E731
    with pytest.raises(ValueError, match="channel map"):
        session_of(tmp_path, "resume", groups=groups)
    session_of(tmp_path, "replace", groups=groups)
    session_of(tmp_path, "resume", groups=groups)


def loss_of(batch: tuple[Tensor, Tensor]) -> Closure:
    return lambda module: F.cross_entropy(module(batch[0]), batch[1])


def train(session: SparseOffload, first: int, last: int, bad: int = -1) -> list[float]:
    """The losses; the batch of step ``bad`` holds a value that is not finite."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        if step == bad:
            batch[0][0] = torch.inf
        losses.append(float(session.step(loss_of(batch))))
    return losses


@pytest.mark.parametrize("stopped", [1, 2, 5, 6])
def test_a_resumed_session_is_bit_equal_to_one_that_never_stopped(tmp_path: Path, stopped: int) -> None:
    whole = session_of(tmp_path / "whole")
    DurableRounds(whole)
    losses = train(whole, 0, K * ROUNDS)
    first = session_of(tmp_path / "parts")
    EveryRound(first)
    train(first, 0, stopped)
    second = session_of(tmp_path / "parts", "resume")
    done = EveryRound(second).restore()
    assert done == stopped - stopped % K
    assert train(second, done, K * ROUNDS) == losses[done:]
    assert torch.equal(second.policy.s, whole.policy.s)
    whole.settle()
    second.settle()
    for kind, array in whole.store.arrays.items():
        assert torch.equal(second.store.arrays[kind], array)
    assert (second.rounds_done, second.forward_flops) == (whole.rounds_done, whole.forward_flops)


Then = Callable[[SparseOffload, DurableRounds], object]


def begin(folder: Path, then: Then, first: int, **more: Any) -> tuple[SparseOffload, DurableRounds]:
    """A session that has made ``first`` steps, and then what ``then`` does."""
    session = session_of(folder, **more)
    durable = EveryThird(session)
    train(session, 0, first)
    then(session, durable)
    return session, durable


def assert_goes_on(left: Path, whole: SparseOffload, done: int, **more: Any) -> None:
    """What a process has left in ``left`` is resumed at step ``done``, and ends as ``whole``, which is there
    by now, does."""
    resumed = session_of(left, "resume", **more)
    assert EveryThird(resumed).restore() == done
    assert train(resumed, done, K * ROUNDS) == train(whole, done, K * ROUNDS)
    for session in (whole, resumed):
        session.settle()
    for kind, array in whole.store.arrays.items():
        assert torch.equal(resumed.store.arrays[kind], array), kind


def test_a_round_that_was_evaluated_and_saved_survives_a_loss_of_power(tmp_path: Path) -> None:
    """What mapped files were given since the last wait for the disk is lost with the power."""

    def evaluated_and_saved(session: SparseOffload, durable: DurableRounds) -> None:
        with session.evaluation():
            pass
        durable.save()

    session_of(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "at_first")
    begin(tmp_path / "run", evaluated_and_saved, 2 * K, mode="replace")
    for path in (tmp_path / "at_first" / "rank0").glob("*.bin"):
        shutil.copy(path, tmp_path / "run" / "rank0")
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    whole, _ = begin(tmp_path / "whole", evaluated_and_saved, 2 * K)
    assert_goes_on(tmp_path / "left", whole, 2 * K)


@pytest.mark.parametrize(
    "then", [lambda session, _: session.settle(), lambda session, _: session.state_dict()]
)
def test_killed_after_the_store_was_written_within_a_round_it_goes_on(tmp_path: Path, then: Then) -> None:
    begin(tmp_path / "run", then, K + 1)
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    whole, _ = begin(tmp_path / "whole", then, K + 1)
    assert_goes_on(tmp_path / "left", whole, K + 1)


def left_by_two_ranks(folder: Path) -> str:
    """One of two ranks: what is said of a log that the second one, which has had fewer batches, finds
    damaged."""
    save: Then = lambda session, durable: (durable.save(), session.settle())  # noqa: E731
    steps = K + 1 - dist.get_rank()
    begin(folder / "run", save, steps)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(folder / "run", folder / "left")
        shutil.copytree(folder / "run", folder / "damaged")
        log = max((folder / "damaged" / "rank1" / "log").iterdir())
        log.write_bytes(log.read_bytes()[:-1])
    dist.barrier()
    whole, _ = begin(folder / "whole", save, steps)
    assert_goes_on(folder / "left", whole, K + 1)
    with pytest.raises(ValueError, match="is damaged") as caught:
        DurableRounds(session_of(folder / "damaged", "resume")).restore()
    return str(caught.value)


def test_two_ranks_log_and_refuse_as_one(tmp_path: Path) -> None:
    said = run_ranks(2, left_by_two_ranks, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith(f"rank 1: {tmp_path / 'damaged' / 'rank1'}")


@pytest.mark.parametrize(("steps", "done"), [(0, 3), (2, 4)])
def test_a_session_that_was_led_back_resumes_from_there(tmp_path: Path, steps: int, done: int) -> None:
    def go_back(session: SparseOffload, _: DurableRounds) -> None:
        state = session.state_dict()
        train(session, 3, 7)
        session.load_state_dict(state)
        train(session, 3, 3 + steps)

    begin(tmp_path / "run", go_back, 3)
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    whole, _ = begin(tmp_path / "whole", lambda session, _: train(session, 3, done), 3)
    assert_goes_on(tmp_path / "left", whole, done)


def test_a_store_that_was_left_while_a_state_was_loaded_is_refused(tmp_path: Path) -> None:
    session, _ = begin(tmp_path / "run", lambda *_: None, 3)
    state = session.state_dict()
    small = torch.load(io.BytesIO(state["small"]), weights_only=True)
    del small["meta"]["forward_flops"]
    torch.save(small, file := io.BytesIO())
    with pytest.raises(ValueError, match="does not fit"):
        session.load_state_dict(state | {"small": file.getvalue()})
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    with pytest.raises(ValueError, match="while a state was loaded into it"):
        DurableRounds(session_of(tmp_path / "left", "resume")).restore()


def test_what_was_saved_of_a_round_that_is_rolled_back_does_not_return(tmp_path: Path) -> None:
    def roll_back(session: SparseOffload, durable: DurableRounds) -> None:
        durable.save()
        train(session, 3, 2 * K + 2, bad=3)

    begin(tmp_path / "run", roll_back, 3, on_nonfinite="rollback")
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    whole, _ = begin(tmp_path / "whole", roll_back, 3, on_nonfinite="rollback")
    assert whole.nonfinite.skipped
    assert_goes_on(tmp_path / "left", whole, 2 * K + 2, on_nonfinite="rollback")


def test_files_and_memory_train_the_same(tmp_path: Path) -> None:
    assert train(session_of(tmp_path), 0, 4) == train(session_of(tmp_path, tier="ram"), 0, 4)


def test_a_store_in_memory_cannot_be_durable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set store\.tier file"):
        DurableRounds(session_of(tmp_path, tier="ram"))
