"""The method of the project as a run drives it."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.config.run import RunConfig, TrainConfig
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.distributed import rank_and_world_size
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.sparse_offload import SparseOffloadMethod
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import StoreConfig
from tests.methods.tasks import batches, make_task
from tests.support.ranks import run_ranks

K, STEPS, POISONED = 4, 20, 11


def start(folder: Path, tier: Any, resumes: bool = False, store: str = "") -> SparseOffloadMethod:
    config = RunConfig(
        run_dir=folder,
        policy=PolicyConfig.paper(rho=0.5, lr=0.05),
        round=RoundConfig(k=K, freeze_at=1.0, prefetch=False),
        store=StoreConfig(tier, store),
        train=TrainConfig(on_nonfinite="rollback"),
    )
    method = build_method(replace(make_task(config), store_mode="resume" if resumes else "replace"))
    assert isinstance(method, SparseOffloadMethod)
    return method


def end_of(folder: Path, tier: Any, wanted_at: int | None) -> dict[str, Tensor]:
    """What a run ends with whose batch ``POISONED`` is not finite; it is killed after the first step from
    ``wanted_at`` on at which it could be saved, and resumed from there.
    """
    data = batches(STEPS)
    data[POISONED] = data[POISONED][0] * torch.nan, data[POISONED][1]
    method, step, killed = start(folder, tier), 0, wanted_at is None
    while step < STEPS:
        method.train_step(data[step], 0.05)
        step += 1
        if wanted_at is None or killed or step < wanted_at:
            continue
        method.records()
        if (state := method.state()) is not None:
            saved, killed = copy.deepcopy(state), True
            method.session.transfers.close()
            method = start(folder, tier, resumes=True)
            method.restore(saved)
            step = method.session.steps_done
    method.session.settle()
    arrays = {kind: array.clone() for kind, array in method.session.store.arrays.items()}
    return arrays | {"s": method.session.policy.s}


def test_only_a_store_that_was_never_filled_is_begun_again(tmp_path: Path) -> None:
    """One that is not there is nowhere begun anew."""
    with pytest.raises(ValueError, match="there is no store in"):
        start(tmp_path, "file", resumes=True)
    start(tmp_path, "file").close(abandon=False)
    never_filled(tmp_path)
    assert start(tmp_path, "file", resumes=True).session.steps_done == 0
    start(tmp_path, "ram", resumes=True)


def test_a_store_that_one_rank_has_not_filled_is_begun_again(tmp_path: Path) -> None:
    """Whatever the others had done when all of them were killed."""
    assert run_ranks(2, steps_of_a_start_behind, 1, tmp_path) == [0, 0]


def steps_of_a_start_behind(late: int, folder: Path) -> int:
    start(folder, "file").close(abandon=False)
    if dist.get_rank() == late:
        never_filled(folder)
    return start(folder, "file", resumes=True).session.steps_done


def never_filled(folder: Path) -> None:
    description = folder / "store" / f"rank{rank_and_world_size()[0]}" / "store.json"
    description.write_text(description.read_text().replace("true", "false"))


def test_a_store_moves_with_the_folder_of_its_run_and_is_no_other_runs(tmp_path: Path) -> None:
    """Of none beside it, around it, or that reaches it by a link."""
    start(tmp_path / "a", "file").close(abandon=False)
    store = Path(shutil.copytree(tmp_path / "a", tmp_path / "b")) / "store"
    start(tmp_path / "b", "file", resumes=True).close(abandon=False)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "store").symlink_to(store)
    for folder, path in (("c", str(store)), (".", str(store)), ("linked", "")):
        with pytest.raises(ValueError, match="has run 'store', this run"):
            start(tmp_path / folder, "file", store=path)


@pytest.mark.parametrize("tier", ["ram", "file"])
@pytest.mark.parametrize("wanted_at", [1, 9, 10])
def test_a_rollback_after_resuming_leads_where_it_leads_without(
    tmp_path: Path, tier: str, wanted_at: int
) -> None:
    """A save that is wanted in the middle of a round waits for its end: a rollback leads to its begin."""
    expected = end_of(tmp_path / "straight", tier, None)
    found = end_of(tmp_path / "parts", tier, wanted_at)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
