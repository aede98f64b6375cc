"""A process killed at any moment of a round leaves a store that its write-ahead log makes whole."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from offload_sparse.channels.selection import Selection
from offload_sparse.store import write_ahead_log
from offload_sparse.store.tiers import FileTier
from offload_sparse.store.weight_store import WeightStore
from offload_sparse.store.write_ahead_log import WriteAheadLog, own_segment
from tests.support import fork_server, killed_rounds
from tests.support.durable import Disk
from tests.support.killed_rounds import ROUNDS, STAGES, open_store, pieces_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    killed_rounds.rounds(folder, "", 0)
    return arrays_of(folder)


def arrays_of(folder: Path) -> dict[str, torch.Tensor]:
    store, _ = open_store(folder, "resume")
    return {kind: array.clone() for kind, array in store.arrays.items()}


def holds(store: WeightStore, log: WriteAheadLog, round: int) -> bool:
    """Whether the store holds what the log of ``round`` wrote, bit for bit."""
    equal = True
    for selection, kind, values in log.pieces(round, store):
        narrow = torch.empty(selection.layout(store.partitions[kind].layout.shapes).size)
        store.gather(selection, kind, narrow)
        low, high = own_segment(store, selection, kind)
        equal &= torch.equal(narrow[low:high].view(torch.uint8), values.view(torch.uint8))
    return equal


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("round", [0, 2])
def test_killed_at_any_stage_the_run_goes_on_to_the_undisturbed_result(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], stage: str, round: int
) -> None:
    arguments = [str(tmp_path), stage, str(round)]
    done = fork_server.shared().run("tests.support.killed_rounds:main", arguments, os.environ, 120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store, _ = open_store(tmp_path, "resume")
    log = WriteAheadLog(tmp_path / "log")
    entry = log.replay(store)
    logged = round if STAGES.index(stage) < STAGES.index("renamed") else round + 1
    assert (entry.state["next"] if entry else 0) == logged
    if entry:
        newest = log.rounds()[-1]
        assert holds(store, log, newest)
        assert torch.equal(entry.tensors["s"], torch.full((3,), float(newest)))
    killed_rounds.rounds(tmp_path, "", 0, first=logged)
    for kind, array in arrays_of(tmp_path).items():
        assert torch.equal(array, undisturbed[kind]), kind


def test_replaying_twice_changes_nothing_more(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    killed_rounds.rounds(tmp_path, "", 0)
    store, _ = open_store(tmp_path, "resume")
    for _ in range(2):
        WriteAheadLog(tmp_path / "log").replay(store)
        assert all(torch.equal(array, undisturbed[kind]) for kind, array in store.arrays.items())


def test_only_the_kept_entries_of_a_log_are_written(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    selection, values = pieces_of(store, 0)[0]
    before = store.arrays["weights"].clone()
    log = WriteAheadLog(tmp_path / "log")
    log.append(store, [(selection, {"weights": values["weights"]})], {})
    assert torch.equal(store.arrays["weights"], before)
    assert not holds(store, log, 0)
    log.replay(store)
    assert (store.arrays["weights"] != before).sum() == values["weights"].numel()


def test_logs_go_when_the_store_has_reached_the_disk_and_never_before(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    for round in range(11):
        log.append(store, pieces_of(store, 0), {"round": round})
    synced: list[list[int]] = []
    log.settle(lambda: synced.append(log.rounds()))
    assert synced == [[*range(11)]]
    assert log.rounds() == [10]
    log.settle(lambda: synced.append([]))
    assert len(synced) == 1
    latest = log.latest()
    assert latest is not None
    assert latest.state == {"round": 10}


def test_logs_are_deleted_for_good_one_by_one_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power the logs that are left are the newest ones, however many: the store holds what
    the others wrote, and an old one alone would undo it.
    """
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    for round in range(4):
        log.append(store, pieces_of(store, round), {})
    left: list[list[int]] = []
    monkeypatch.setattr(write_ahead_log, "sync_folder", lambda folder: left.append(log.rounds()))
    log.settle(lambda: None)
    assert left == [[1, 2, 3], [2, 3], [3]]


def test_a_log_lasts_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = open_store(tmp_path, "new")
    log, disk = WriteAheadLog(tmp_path / "log"), Disk(monkeypatch)
    log.append(store, pieces_of(store, 0), {})
    assert disk.lasts(tmp_path / "log" / "round-0.safetensors")


def test_rounds_that_not_every_rank_logged_are_dropped(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    for round in range(3):
        log.append(store, pieces_of(store, round), {})
    log.drop_after(1)
    assert log.rounds() == [0, 1]
    log.drop_after(-1)
    assert log.latest() is None


def test_a_log_that_stands_alone_is_applied_without_those_before(tmp_path: Path) -> None:
    """The store on the disk held the rest of it, and may have gone back since the others were written."""
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    log.append(store, pieces_of(store, 0), {})
    log.append(store, [], {"alone": 1}, alone=True)
    before = {kind: array.clone() for kind, array in store.arrays.items()}
    entry = log.replay(store)
    assert entry is not None
    assert entry.state == {"alone": 1}
    assert all(torch.equal(array, before[kind]) for kind, array in store.arrays.items())
    log.append(store, pieces_of(store, 2), {})
    log.replay(store)
    assert holds(store, log, 2)
    assert not holds(store, log, 0)


def test_a_damaged_log_is_told_without_showing_what_is_in_it(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    log.append(store, pieces_of(store, 0), {})
    header = json.dumps("x" * 100_000).encode()
    path = tmp_path / "log" / "round-0.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is damaged") as caught:
        log.latest()
    assert len(str(caught.value)) < 1000


def test_a_damaged_log_is_told_and_not_applied(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    log.append(store, pieces_of(store, 0), {})
    path = tmp_path / "log" / "round-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = {kind: array.clone() for kind, array in store.arrays.items()}
    with pytest.raises(ValueError, match="is damaged"):
        log.replay(store)
    assert all(torch.equal(array, before[kind]) for kind, array in store.arrays.items())


def test_a_log_of_another_partition_is_refused(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, "new")
    log = WriteAheadLog(tmp_path / "log")
    selection, values = pieces_of(store, 0)[0]
    log.append(store, [(selection, {"buffers": values["weights"]})], {})
    other = Selection(store.channel_map, store.channel_map.full_mask())
    log.append(store, [(other, {"weights": torch.zeros(3)})], {})
    with pytest.raises(ValueError, match="belongs to another run"):
        log.replay(store)


def test_the_logs_take_the_store_of_their_rank_only(tmp_path: Path) -> None:
    """Of two ranks, each logs its own run of the narrow buffers, and together they restore the whole."""
    stores = [open_store(tmp_path / "a", "new", rank, 2)[0] for rank in range(2)]
    whole, tier = open_store(tmp_path / "b", "new")
    assert isinstance(tier, FileTier)
    for selection, values in (pieces := pieces_of(whole, 0)):
        for kind, narrow in values.items():
            whole.scatter(selection, kind, narrow)
    for rank, store in enumerate(stores):
        log = WriteAheadLog(tmp_path / f"log{rank}")
        log.append(store, pieces, {})
        log.replay(store)
    for name in whole.channel_map.shapes:
        rows = torch.cat([store.own_rows(name) for store in stores])
        assert torch.equal(rows, whole.own_rows(name))


def test_the_rounds_of_the_example_overlap(tmp_path: Path) -> None:
    """Otherwise the order in which logs are applied would not matter."""
    store, _ = open_store(tmp_path, "new")
    masks = [selection.mask for round in range(ROUNDS) for selection, _ in pieces_of(store, round)]
    assert bool(torch.stack(masks).sum(0).gt(1).any())
