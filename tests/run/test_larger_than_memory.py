"""Files that are longer than the machine has memory are opened, and parts of them are read.

They are sparse: what nobody has written is zero, and takes no disk space."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload_sparse.run.checkpoint_files import RowsFile
from offload_sparse.store.files import write_file
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.tiers import FileTier, Identity
from offload_sparse.store.weight_files import read_rows, tensors_in

COLUMNS = 1024
ROWS = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (4 * COLUMNS)
LAST = torch.arange(float(COLUMNS))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One tensor of ``ROWS`` rows, all zero but the last; as weights, and as the rows of a checkpoint."""
    path = tmp_path / "large.safetensors"
    rows = torch.zeros(()).expand(ROWS, COLUMNS)
    header = next(blocks_of({"w": rows}, {"rows": json.dumps({"w": [0, ROWS, COLUMNS]})}))
    path.write_bytes(header)
    os.truncate(path, len(header) + 4 * rows.numel())
    write_last_row(path)
    return path


def write_last_row(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-LAST.nbytes, os.SEEK_END)
        file.write(LAST.numpy().tobytes())


def two_rows() -> Tensor:
    return torch.full((2, COLUMNS), torch.nan)


def test_rows_of_weights(file: Path) -> None:
    rows = two_rows()
    read_rows(tensors_in(file)["w"], ROWS - 2, ROWS, rows)
    assert torch.equal(rows, torch.stack([torch.zeros(COLUMNS), LAST]))


def test_rows_of_a_checkpoint_which_other_ranks_have_written(file: Path) -> None:
    rows = two_rows()
    assert RowsFile(file).copy_rows("w", ROWS - 2, rows) == 2
    assert torch.equal(rows, torch.stack([torch.zeros(COLUMNS), LAST]))


def test_a_store_that_is_only_looked_at(tmp_path: Path) -> None:
    """What is written to it stays in this process."""
    identity = Identity("run", "channels", "float32", 1, 0)
    tier = FileTier(tmp_path, identity)
    tier.allocate("weights", COLUMNS)
    tier.complete({})
    del tier
    folder = tmp_path / "rank0"
    described = json.loads((folder / "store.json").read_text())
    described["sizes"] = {"weights": ROWS * COLUMNS}
    write_file(folder / "store.json", [memoryview(json.dumps(described).encode())])
    os.truncate(folder / "weights.bin", ROWS * COLUMNS * 4)
    write_last_row(folder / "weights.bin")
    weights = FileTier(tmp_path, identity, mode="look").allocate("weights", ROWS * COLUMNS)
    assert torch.equal(weights[-COLUMNS:], LAST)
    weights[-COLUMNS:] = 0
    with (folder / "weights.bin").open("rb") as file:
        file.seek(-LAST.nbytes, os.SEEK_END)
        assert file.read() == LAST.numpy().tobytes()
