"""Durable files: old or new, whole, whatever happens."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload_sparse.store.files import make_folder, replacing, write_file
from offload_sparse.store.tiers import FileTier, Identity
from tests.support.durable import Disk


@pytest.mark.parametrize("content", [b"new", "new", [b"n", memoryview(b"ew")]])
def test_a_file_is_synced_then_renamed_then_its_folder_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    disk = Disk(monkeypatch)
    write_file(tmp_path / "a.json", content)  # type: ignore[arg-type]
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert disk.events == [
        ("fsync", tmp_path / "a.json.tmp"),
        ("rename", tmp_path / "a.json"),
        ("fsync", tmp_path),
    ]
    assert disk.lasts(tmp_path / "a.json")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def half() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    write_file(tmp_path / "a", "old")
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", half())
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_folder_is_synced_with_everything_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for text in ("one", "two"):
        with replacing(tmp_path / "network") as temporary:
            (temporary / "below").mkdir(parents=True)
            (temporary / "below" / "b").write_text(text)
    assert (tmp_path / "network" / "below" / "b").read_text() == "two"
    order = [event for event in disk.events if event[1].name in ("b", "below", "network.tmp", "network")]
    one = [
        ("fsync", tmp_path / "network.tmp" / "below" / "b"),
        ("fsync", tmp_path / "network.tmp" / "below"),
        ("fsync", tmp_path / "network.tmp"),
        ("rename", tmp_path / "network"),
    ]
    assert order == one * 2


def test_every_folder_that_is_made_is_synced_in_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    assert {path for _, path in disk.events} == {tmp_path, tmp_path / "a"}


def test_a_store_lasts_before_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    tier = FileTier(tmp_path, Identity("run", "0", "float32", 1, 0))
    tier.allocate("weights", 50).copy_(torch.arange(50))
    tier.complete({"norm.count": torch.tensor(3)})
    folder = tmp_path / "rank0"
    for name in ("weights.bin", "integers.safetensors", "store.json"):
        assert disk.lasts(folder / name), name
    last = max(i for i, event in enumerate(disk.events) if event == ("rename", folder / "store.json"))
    assert ("fsync", folder / "weights.bin") in disk.events[:last]
    assert ("rename", folder / "integers.safetensors") in disk.events[:last]
