"""Stores in files: the same as in memory, known by whose they are, and never overwritten by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.channels.selection import Selection
from offload_sparse.store import direct_files, tiers
from offload_sparse.store.tiers import FileTier, Identity, MemoryTier, Mode, digest, open_tier
from offload_sparse.store.weight_store import Ranks, WeightStore

ATOMS = torch.arange(6)
MAP = ChannelMap(
    (Group("a", 0, 6),),
    {"w": (6, 5), "v": (4, 6), "b": (6,)},
    {"w": (ATOMS, None), "v": (None, ATOMS), "b": (ATOMS,)},
)
IDENTITY = Identity.of("run", MAP, torch.float32, 1, 0)


def store_on(tier: tiers.MemoryTier, ranks: Ranks | None = None) -> WeightStore:
    made = WeightStore(MAP, ("w", "v"), ("b",), ("momentum_buffer",), ranks=ranks, tier=tier)
    if not tier.filled:
        generator = torch.Generator().manual_seed(0)
        values = {name: torch.randn(shape, generator=generator) for name, shape in MAP.shapes.items()}
        made.fill([*values.items(), ("count", torch.tensor(7))])
        tier.complete(made.integer_buffers)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_store_in_files_moves_the_same_bits_as_one_in_memory(tmp_path: Path) -> None:
    stores = store_on(FileTier(tmp_path, IDENTITY)), store_on(MemoryTier(torch.float32, "off"))
    selection = Selection(MAP, torch.tensor([True, False, True, True, False, False]))
    for kind in ("weights", "momentum_buffer", "buffers"):
        size = selection.layout(stores[0].partitions[kind].layout.shapes).size
        narrow = [torch.empty(size) for _ in stores]
        for store, values in zip(stores, narrow, strict=True):
            store.gather(selection, kind, values)
            store.scatter(selection, kind, values + 1)
        assert torch.equal(*narrow)
        assert torch.equal(stores[0].arrays[kind], stores[1].arrays[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_written_is_there_when_the_store_is_opened_again(tmp_path: Path, dtype: torch.dtype) -> None:
    identity = Identity.of("run", MAP, dtype, 1, 0)
    first = FileTier(tmp_path, identity, dtype)
    first.allocate("weights", 50).copy_(torch.arange(50))
    first.allocate("empty", 0)
    first.complete({"norm.count": torch.tensor(3)})
    again = FileTier(tmp_path, identity, dtype, "resume")
    assert torch.equal(again.allocate("weights", 50), torch.arange(50, dtype=dtype))
    assert again.allocate("empty", 0).shape == (0,)
    assert again.integers() == {"norm.count": torch.tensor(3)}


def test_a_new_array_is_zero_and_its_disk_space_is_taken(tmp_path: Path) -> None:
    array = FileTier(tmp_path, IDENTITY).allocate("weights", 1 << 20)
    assert not array.any()
    assert (tmp_path / "rank0" / "weights.bin").stat().st_blocks * 512 >= 4 << 20


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"run": "other"}, "run 'run'"),
    ({"channel_map": "0" * 32}, "channel map"),
    ({"world_size": 2}, "world size 1"),
    ({"dtype": "float64"}, "dtype 'float32'"),
]


@pytest.mark.parametrize(
    ("changed", "said", "mode"),
    [*((*other, mode) for other in OTHERS for mode in ("new", "resume")), (*OTHERS[0], "replace")],
)
def test_the_store_of_another_run_is_refused_and_left_alone(
    tmp_path: Path, changed: dict[str, Any], said: str, mode: Mode
) -> None:
    store_on(FileTier(tmp_path, IDENTITY))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=said) as refusal:
        FileTier(tmp_path, replace(IDENTITY, **changed), mode=mode)
    assert "\n" not in str(refusal.value)
    assert "store.path" in str(refusal.value)
    assert contents(tmp_path) == before


def test_a_store_of_several_ranks_is_not_looked_at_by_one(tmp_path: Path) -> None:
    """As by ``evaluate`` of a checkpoint of its run, for which no other folder is of use."""
    store_on(FileTier(tmp_path, replace(IDENTITY, world_size=2)), Ranks(0, 2))
    with pytest.raises(ValueError, match="has world size 2, this run 1; finish the run"):
        FileTier(tmp_path, IDENTITY, mode="look")


@pytest.mark.parametrize("changed", [changed for changed, _ in OTHERS[1:]])
def test_a_run_replaces_its_own_store_whatever_it_was(tmp_path: Path, changed: dict[str, Any]) -> None:
    """With those of ranks that there are no more; what others have left beside them stays."""
    for rank in range(4):
        store_on(FileTier(tmp_path, replace(IDENTITY, world_size=4, rank=rank)), Ranks(rank, 4))
    shutil.copytree(tmp_path / "rank2", tmp_path / "rank2_kept")
    described = tmp_path / "rank3" / "store.json"
    described.write_text(described.read_text().replace('"run": "run"', '"run": "other"'))
    identity = replace(IDENTITY, **changed)
    tier = FileTier(tmp_path, identity, mode="replace")
    assert not tier.allocate("weights", 54).any()
    left = {path.name for path in tmp_path.glob("rank*/")}
    assert left == {*(f"rank{rank}" for rank in (0, 3, *range(1, identity.world_size))), "rank2_kept"}
    assert (tmp_path / "rank2_kept" / "weights.bin").exists()


def test_the_store_of_another_rank_is_refused(tmp_path: Path) -> None:
    store_on(FileTier(tmp_path, replace(IDENTITY, world_size=2)), Ranks(0, 2))
    shutil.copytree(tmp_path / "rank0", tmp_path / "rank1")
    with pytest.raises(ValueError, match="has rank 0, this run 1"):
        FileTier(tmp_path, replace(IDENTITY, world_size=2, rank=1), mode="resume")


def test_a_filled_store_is_made_anew_only_when_asked_to(tmp_path: Path) -> None:
    first = store_on(FileTier(tmp_path, IDENTITY)).arrays["weights"].clone()
    with pytest.raises(ValueError, match="resume it, delete the folder"):
        FileTier(tmp_path, IDENTITY)
    again = FileTier(tmp_path, IDENTITY, mode="replace")
    assert not again.allocate("weights", first.numel()).any()


def test_a_store_half_filled_is_filled_again(tmp_path: Path) -> None:
    """It cannot be resumed."""
    FileTier(tmp_path, IDENTITY).allocate("weights", 54).fill_(3)
    with pytest.raises(ValueError, match="never filled"):
        FileTier(tmp_path, IDENTITY, mode="resume")
    assert not FileTier(tmp_path, IDENTITY).allocate("weights", 54).any()


def test_a_missing_or_damaged_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no store"):
        FileTier(tmp_path, IDENTITY, mode="resume")
    store_on(FileTier(tmp_path, IDENTITY))
    weights = tmp_path / "rank0" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"weights\.bin does not hold 54 values"):
        store_on(FileTier(tmp_path, IDENTITY, mode="resume"))
    (tmp_path / "rank0" / "store.json").write_text("{")
    for mode in ("new", "resume"):
        with pytest.raises(ValueError, match="does not describe a store"):
            FileTier(tmp_path, IDENTITY, mode=mode)  # type: ignore[arg-type]
    (tmp_path / "rank0" / "store.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a store"):
        FileTier(tmp_path, IDENTITY)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_buffers_that_are_missing_or_damaged_are_one_line(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    store_on(FileTier(tmp_path, IDENTITY))
    damage(tmp_path / "rank0" / "integers.safetensors")
    with pytest.raises(ValueError, match=r"integers\.safetensors is missing .*; give store\.path") as told:
        FileTier(tmp_path, IDENTITY, mode="resume").integers()
    assert "\n" not in str(told.value)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "thesis.tex").write_text("years of work")
    for mode in ("new", "replace", "resume"):
        with pytest.raises(ValueError, match=r"no store\.json"):
            FileTier(tmp_path, IDENTITY, mode=mode)  # type: ignore[arg-type]
    assert (tmp_path / "rank0" / "thesis.tex").read_text() == "years of work"


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match=r"GiB free; free space or set store\.path"):
        tier.allocate("weights", 1 << 50)
    assert not (tmp_path / "rank0" / "weights.bin").exists()


def test_store_json_says_whose_the_store_is(tmp_path: Path) -> None:
    store_on(FileTier(tmp_path, IDENTITY))
    found = json.loads((tmp_path / "rank0" / "store.json").read_text())
    assert found == {
        "format": 1,
        **asdict(IDENTITY),
        "sizes": {"weights": 54, "buffers": 6, "momentum_buffer": 54},
        "initialised": True,
    }


def test_the_digest_tells_channels_shapes_and_names_apart() -> None:
    shapes, axes = dict(MAP.shapes), dict(MAP.axes)
    others = [
        ChannelMap((Group("c", 0, 6),), shapes, axes),
        ChannelMap(MAP.groups, shapes, axes | {"b": (ATOMS.flip(0),)}),
        ChannelMap(MAP.groups, shapes, axes | {"b": (None,)}),
        ChannelMap(MAP.groups, shapes | {"w": (6, 4)}, axes),
    ]
    same = ChannelMap(MAP.groups, dict(shapes), {n: tuple(a) for n, a in axes.items()})
    assert digest(same) == digest(MAP)
    assert len({digest(m) for m in (MAP, *others)}) == 5


def test_memory_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set store\.tier file"):
        open_tier("ram", tmp_path, IDENTITY, torch.float32, "off", "resume")


def test_without_deepspeed_nvme_is_the_file_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one warning says so."""
    monkeypatch.setattr(direct_files, "_missing", lambda: "libaio is missing")
    tier = open_tier("nvme", tmp_path, IDENTITY, torch.float32, "off")
    assert isinstance(tier, FileTier)
    assert tier.direct is None
    store_on(tier)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "libaio is missing" in caplog.text


def test_a_kill_at_the_start_leaves_a_store_that_may_begin(tmp_path: Path) -> None:
    """Killed while a store is begun, and while it is replaced."""
    folder = tmp_path / "rank0"
    folder.mkdir()
    (folder / "store.json.tmp").write_text("{")  # killed before the first rename
    store_on(FileTier(tmp_path, IDENTITY))
    FileTier(tmp_path, IDENTITY, mode="replace")  # killed here
    store_on(FileTier(tmp_path, IDENTITY))
    assert {path.name for path in folder.iterdir()} >= {"store.json", "weights.bin", "integers.safetensors"}
