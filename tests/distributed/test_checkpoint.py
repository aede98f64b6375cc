"""Checkpoints between ranks: saved by two, loaded by one, two and three; what befalls one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import restore_session, session_state
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run import checkpoint_files
from offload_sparse.run.checkpoint import Checkpointer
from offload_sparse.run.signals import Agreement
from tests.support.ranks import run_ranks
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net, whole

FIRST, SECOND = 8, 4


def new_session() -> SparseOffload:
    policy, rounds = PolicyConfig.paper(rho=0.5, lr=0.05), RoundConfig(k=4)
    return make_session(small_net(), policy, rounds, forward=Forward(frozen_batch_norm=True))


def everything(session: SparseOffload) -> dict[str, Tensor]:
    kinds = {kind: whole(session.store, kind) for kind in session.store.partitions}
    return kinds | {"s": session.policy.s.clone(), "steps": torch.tensor(session.steps_done)}


def train(session: SparseOffload, first: int, last: int) -> None:
    for batch in batches(FIRST + SECOND)[first:last]:
        session.step(loss_of(own_part(batch)))
    session.records()


def straight(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, save in the background, train on; the state at the checkpoint and at the end."""
    session, saver = new_session(), Checkpointer(Path(folder), CheckpointConfig(), {})
    train(session, 0, FIRST)
    state = session_state(session)
    assert state is not None
    state.local["rank"] = torch.tensor(dist.get_rank() if dist.is_initialized() else 0)
    saved = everything(session)
    saver.save(FIRST, state, {})
    session.transfers.before_return = saver.join
    train(session, FIRST, FIRST + SECOND)
    assert saver.join()
    return saved, everything(session)


def resumed(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    session, saver = new_session(), Checkpointer(Path(folder), CheckpointConfig(), {})
    fresh = session_state(session)
    assert fresh is not None
    for shard in fresh.sharded.values():
        shard.own.fill_(torch.nan)
    loaded = saver.load(fresh)
    assert loaded is not None
    local = [int(t) for t in loaded.state.local.values()]
    restore_session(session, loaded.state)
    found = everything(session)
    train(session, loaded.manifest.step, FIRST + SECOND)
    return found, everything(session), local


def test_saved_by_two_ranks_loaded_by_one_two_and_three(tmp_path: Path) -> None:
    """The store is equal bit for bit; two ranks carry on bit-equal, one up to the order of sums, three
    only load (the batches of 8 images do not divide).
    """
    ranks = run_ranks(2, straight, str(tmp_path))
    saved, end = ranks[0]
    for world_size in (1, 2):
        outcomes = run_ranks(world_size, resumed, str(tmp_path))
        for rank, (found, finally_, local) in enumerate(outcomes):
            for name, value in saved.items():
                assert torch.equal(found[name], value), (world_size, name)
            assert local == ([rank] if world_size == 2 else [])
            for name, value in end.items():
                if world_size == 2:
                    assert torch.equal(finally_[name], value), name
                torch.testing.assert_close(finally_[name], value, rtol=1e-8, atol=1e-8, msg=name)
    for found, local in run_ranks(3, only_loaded, str(tmp_path)):
        assert local == []
        for name, value in saved.items():
            assert torch.equal(found[name], value), (3, name)


def only_loaded(folder: str) -> tuple[dict[str, Tensor], list[int]]:
    session, saver = new_session(), Checkpointer(Path(folder), CheckpointConfig(), {})
    fresh = session_state(session)
    assert fresh is not None
    loaded = saver.load(fresh)
    assert loaded is not None
    restore_session(session, loaded.state)
    return everything(session), [int(t) for t in loaded.state.local.values()]


def fails_on_rank_one(folder: str) -> tuple[bool, int]:
    """Rank 1 cannot write its second checkpoint, and both ranks know it."""
    session, saver = new_session(), Checkpointer(Path(folder), CheckpointConfig(), {})
    state = session_state(session)
    assert state is not None
    saver.save(1, state, {})
    assert saver.join()
    original = checkpoint_files.write_rows

    def write(path: Path, *more: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return original(path, *more)

    checkpoint_files.write_rows = write
    saver.save(2, state, {})
    written = saver.join()
    checkpoint_files.write_rows = original
    loaded = saver.load(state)
    assert loaded is not None
    return written, loaded.manifest.step


def damaged_on_rank_one(folder: str) -> int:
    """Only one of the ranks meets the damage, and both take the older checkpoint."""
    session, saver = new_session(), Checkpointer(Path(folder), CheckpointConfig(), {})
    state = session_state(session)
    assert state is not None
    saver.save(1, state, {})
    saver.save(2, state, {})
    assert saver.join()
    if dist.get_rank() == 0:
        with (Path(folder) / "step_00000002" / "rank_1.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
    dist.barrier()
    loaded = saver.load(state)
    assert loaded is not None
    return loaded.manifest.step


def ask_on_rank_one() -> list[tuple[bool, ...]]:
    agreement = Agreement()
    answers = [agreement.exchange(dist.get_rank() == 1 and step == 2, False) for step in range(5)]
    return [*answers, agreement.drain()]


@pytest.mark.parametrize(
    ("function", "expected"), [(fails_on_rank_one, (False, 1)), (damaged_on_rank_one, 1)]
)
def test_what_befalls_one_rank_is_known_to_both(function: Any, expected: Any, tmp_path: Path) -> None:
    assert run_ranks(2, function, str(tmp_path)) == [expected, expected]


def test_ranks_agree_to_stop_at_the_same_step() -> None:
    no, stop = (False, False), (True, False)
    first: tuple[bool, ...] = (False, False)
    expected = [first, no, no, stop, no, no]
    assert run_ranks(2, ask_on_rank_one) == [expected, expected]
