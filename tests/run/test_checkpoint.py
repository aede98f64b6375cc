"""A checkpoint is complete and intact, or it is not used; reading one runs no code from it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offload_sparse.config.run import CheckpointConfig
from offload_sparse.engine.state import MethodState, Shard
from offload_sparse.export import json_values
from offload_sparse.export.json_values import digest
from offload_sparse.run import checkpoint_files
from offload_sparse.run.checkpoint import Checkpointer
from offload_sparse.run.checkpoint_files import CheckpointFolder
from offload_sparse.store import tensor_file

CHANNELS = {"groups": [["g", 0, 3]]}
VALUES = {"optim.lr": 0.1, "model.name": "net"}


def state(offset: float = 0.0) -> MethodState:
    """A state with tensors of many types, as views of one memory, with a scalar and an empty tensor."""
    flat = torch.arange(20, dtype=torch.float64) + offset
    return MethodState(
        {
            "weights/a": Shard(flat[:12].view(4, 3), (4, 3)),
            "weights/scalar": Shard(flat[12:13], ()),
            "weights/empty": Shard(flat[:0].view(0, 3), (0, 3)),
            "buffers/b": Shard(flat[13:20], (7,)),
        },
        {
            "s": torch.linspace(0, 1, 5) + offset,
            "mask": torch.tensor([True, False, True]),
            "step": torch.tensor(3 + offset, dtype=torch.bfloat16),
            "count": torch.tensor(7),
        },
        {"rng": torch.arange(16, dtype=torch.uint8)},
        {"steps_done": 3, "share": 0.1 + 0.2, "channel_map": digest(CHANNELS)},
    )


def checkpointer(folder: Path, keep: int = 2) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", CheckpointConfig(keep=keep), VALUES)


def blank() -> MethodState:
    fresh = state(100.0)
    for shard in fresh.sharded.values():
        shard.own.zero_()
    return MethodState(fresh.sharded, meta=fresh.meta)


def assert_equal(found: MethodState, expected: MethodState) -> None:
    for name, shard in expected.sharded.items():
        assert torch.equal(found.sharded[name].own, shard.own), name
    for found_part, part in ((found.replicated, expected.replicated), (found.local, expected.local)):
        assert found_part.keys() == part.keys()
        for name, tensor in part.items():
            assert found_part[name].dtype == tensor.dtype
            assert torch.equal(found_part[name], tensor), name
    assert found.meta == expected.meta


def two_checkpoints(folder: Path) -> Checkpointer:
    saver = checkpointer(folder)
    saver.save(3, state(1.0), {"note": "older"})
    saver.save(5, state(2.0), {"note": "newer"})
    assert saver.join()
    return saver


def test_what_was_saved_is_loaded_into_the_memory_of_the_fresh_state(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(3, state(1.0), {"unlogged": [[0.1, None, {"accuracy": 0.5}]]})
    fresh = blank()
    loaded = saver.load(fresh)
    assert loaded is not None
    assert (loaded.manifest.step, loaded.manifest.run) == (3, {"unlogged": [[0.1, None, {"accuracy": 0.5}]]})
    assert_equal(loaded.state, state(1.0))
    assert torch.equal(fresh.sharded["weights/a"].own, state(1.0).sharded["weights/a"].own)


def test_without_any_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert checkpointer(tmp_path).load(blank()) is None


def test_a_checkpoint_consists_of_json_and_safetensors(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(3, state(), {})
    assert saver.join()
    folder = saver.folder.of_step(3)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank_0.safetensors"]
    with safe_open(folder / "rank_0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("replicated/s"), state().replicated["s"])
    json.loads((folder / "manifest.json").read_text())


def test_the_newest_the_best_and_no_others_are_kept(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, keep=2)
    for step in range(1, 7):
        saver.save(step, state(), {}, best=step in (1, 3))
    assert saver.join()
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert [f.name for f in folder.checkpoints()] == ["step_00000006", "step_00000005", "step_00000003"]
    assert folder.pointed("latest") == folder.of_step(6)
    assert folder.pointed("best") == folder.of_step(3)


def test_half_written_checkpoints_are_neither_read_nor_left(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000009.tmp").mkdir()
    (folder / "step_00000009.tmp" / "rank_0.safetensors").write_bytes(b"half")
    loaded = checkpointer(tmp_path).load(blank())
    assert loaded is not None
    assert loaded.manifest.step == 5
    assert not (folder / "step_00000009.tmp").exists()


def test_a_full_disk_is_a_warning_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = two_checkpoints(tmp_path)

    def full(path: Path, *_: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_files, "write_rows", full)
    saver.save(7, state(3.0), {})
    assert not saver.join()
    assert saver.join(), "the failure is told once"
    assert "step 7 was not written ([Errno 28] No space left on device)" in caplog.text
    monkeypatch.undo()
    loaded = saver.load(blank())
    assert loaded is not None
    assert loaded.manifest.step == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000005",
    ]


def test_the_store_may_change_as_soon_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the disk is still at work."""
    saver = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(), {})
    on_disk, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert on_disk.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saved = state(3.0)
    saver.save(7, saved, {})
    saver.release()
    expected = {name: shard.own.clone() for name, shard in saved.sharded.items()}
    for shard in saved.sharded.values():
        shard.own.add_(1)
    assert saver.folder.checkpoints() == [], "it is not complete"
    on_disk.set()
    assert saver.join()
    fresh = blank()
    assert saver.load(fresh) is not None
    for name, shard in fresh.sharded.items():
        assert torch.equal(shard.own, expected[name])


def test_a_file_that_is_longer_than_what_may_wait_in_memory_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_BLOCK", 64)
    monkeypatch.setattr(checkpoint_files, "_CACHED", 100)
    tensors = {"a": torch.randn(33, 5), "b": torch.arange(70)}
    record = checkpoint_files.write_rows(tmp_path / "rank_0.safetensors", tensors, {}, lambda: None)
    checkpoint_files.check_file(tmp_path / "rank_0.safetensors", record)
    found = load_file(tmp_path / "rank_0.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_folder_that_is_deleted_under_the_run_is_made_again(tmp_path: Path) -> None:
    saver = two_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    saver.save(7, state(3.0), {})
    loaded = saver.load(blank())
    assert loaded is not None
    assert loaded.manifest.step == 7


def test_a_checkpoint_of_earlier_versions_names_every_channel_and_is_read(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(3, state(), {})
    assert saver.join()
    for channels, fits in ((CHANNELS, True), ({"groups": [["g", 0, 4]]}, False)):
        rewrite(saver.folder.of_step(3), lambda body, c=channels: body["method"].update(channel_map=c))  # type: ignore[misc]
        if fits:
            assert saver.load(blank()) is not None
        else:
            with pytest.raises(ValueError, match="other channels"):
                saver.load(blank())


def test_a_checkpoint_that_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = checkpointer(tmp_path)
    saver.save(3, state(), {})
    assert saver.join()
    monkeypatch.setattr(json_values, "MAX_VALUES", 1000)
    saver.save(5, state(), {"recent": list(range(1000))})
    assert not saver.join()
    assert "could not be read again: it holds more than 1,000 values" in caplog.text
    assert saver.folder.checkpoints() == [saver.folder.of_step(3)]


# --- damage ------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it the right digest: what a forger would do."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    path.write_text(json.dumps(body | {"digest": digest(body)}))


def rewrite_rows(
    folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], name: str = "rank_0"
) -> None:
    """Change the tensors of a file and what it says of their rows; size and checksum are made to fit."""
    path = folder / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rows = json.loads(file.metadata()["rows"])
    change(tensors, rows)
    save_file(tensors, path, {"rows": json.dumps(rows)})
    content = path.read_bytes()
    record = {"size": len(content), "crc32": zlib.crc32(content)}
    rewrite(folder, lambda body: body["files"].update({path.name: record}))


A = "sharded/weights/a"


def move_file(body: dict[str, Any]) -> None:
    body["files"]["../rank_0.safetensors"] = body["files"].pop("rank_0.safetensors")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a shard is truncated": lambda f: os.truncate(f / "rank_0.safetensors", 100),
    "a shard is empty": lambda f: os.truncate(f / "rank_0.safetensors", 0),
    "a shard is missing": lambda f: (f / "rank_0.safetensors").unlink(),
    "a shard is a folder": lambda f: [
        (f / "rank_0.safetensors").unlink(),
        (f / "rank_0.safetensors").mkdir(),
    ],
    "a shard is a link": lambda f: [
        (f / "rank_0.safetensors").rename(f.parent / "elsewhere"),
        (f / "rank_0.safetensors").symlink_to(f.parent / "elsewhere"),
    ],
    "the manifest is missing": lambda f: (f / "manifest.json").unlink(),
    "the manifest is truncated": lambda f: os.truncate(f / "manifest.json", 200),
    "the manifest is no JSON": lambda f: (f / "manifest.json").write_bytes(b"\x80\x04\x95"),
    "the manifest is deep": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "the manifest is a list": lambda f: (f / "manifest.json").write_text("[]"),
    "the digest is of another text": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"step": 5', '"step": 6')
    ),
    "another format": lambda f: rewrite(f, lambda b: b.update(format=99)),
    "a path leaves the folder": lambda f: rewrite(f, move_file),
    "tensors are missing": lambda f: rewrite_rows(f, lambda t, r: [t.pop(A), r.pop(A)]),
    "more tensors": lambda f: rewrite_rows(f, lambda t, r: [t.update(x=t[A].clone()), r.update(x=r[A])]),
    "another shape": lambda f: rewrite_rows(f, lambda t, r: r.update({A: [0, 4, 2]})),
    "another shape inside": lambda f: rewrite_rows(f, lambda t, r: t.update({A: t[A][:, :2].clone()})),
    "rows are missing": lambda f: rewrite_rows(f, lambda t, r: t.update({A: t[A][:3].clone()})),
    "rows are elsewhere": lambda f: rewrite_rows(f, lambda t, r: r.update({A: [1, 4, 3]})),
    "rows are text": lambda f: rewrite_rows(f, lambda t, r: r.update({A: ["0", 4, 3]})),
    "rows are nowhere": lambda f: rewrite_rows(f, lambda t, r: r.update({A: []})),
    "another type": lambda f: rewrite_rows(f, lambda t, r: t.update({A: t[A].long()})),
    "a file of nobody": lambda f: rewrite(
        f, lambda b: b["files"].update({"rank_7.safetensors": b["files"]["rank_0.safetensors"]})
    ),
    "more ranks than files": lambda f: rewrite(f, lambda b: b.update(world_size=1 << 60)),
    "more than there is": lambda f: rewrite_rows(f, lambda t, r: r.update({A: [0, 1 << 40, 3]})),
    "keys are missing": lambda f: rewrite(f, lambda b: b.pop("run")),
    "a negative step": lambda f: rewrite(f, lambda b: b.update(step=-1)),
    "files are a list": lambda f: rewrite(f, lambda b: b.update(files=[])),
    "another configuration": lambda f: rewrite(f, lambda b: b["config"].update({"optim.lr": 0.2})),
    "other channels": lambda f: rewrite(f, lambda b: b["method"].update(channel_map={})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_older_one_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_checkpoints(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoints" / "step_00000005")
    loaded = checkpointer(tmp_path).load(blank())
    assert loaded is not None
    assert loaded.manifest.step == 3
    assert_equal(loaded.state, state(1.0))
    assert "step_00000005 cannot be used" in caplog.text
    assert (tmp_path / "checkpoints" / "step_00000005").exists(), "nothing is removed"


def test_a_damaged_checkpoint_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    """The run goes on from the older one, and what it saves on the way is what it has."""
    saver = two_checkpoints(tmp_path)
    DAMAGES["a shard is truncated"](saver.folder.of_step(5))
    saver = checkpointer(tmp_path, keep=1)
    assert saver.load(blank()) is not None
    saver.save(4, state(3.0), {})
    loaded = saver.load(blank())
    assert loaded is not None
    assert loaded.manifest.step == 4
    assert saver.folder.checkpoints() == [saver.folder.of_step(5), saver.folder.of_step(4)]


@pytest.mark.parametrize("damage", ["a shard is truncated", "another shape", "another configuration"])
def test_when_none_is_left_it_is_one_line_of_advice(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """About the newest; of the others a warning each."""
    two_checkpoints(tmp_path)
    for step in (3, 5):
        DAMAGES[damage](tmp_path / "checkpoints" / f"step_{step:08d}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used .*--overwrite true") as error:
        checkpointer(tmp_path).load(blank())
    assert "\n" not in str(error.value)
    assert "step_00000005" in str(error.value)
    assert caplog.text.count("cannot be used") == caplog.text.count("step_00000003 cannot be used") == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["rank_0.safetensors", "manifest.json"]),
    where=st.floats(0, 1),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_is_noticed(tmp_path: Path, name: str, where: float, bit: int) -> None:
    """Or means nothing: JSON has spaces, and letters of a number's exponent, that may be either way."""
    saver = checkpointer(tmp_path)
    saver.save(5, state(2.0), {"note": "newer"})
    assert saver.join()
    path = tmp_path / "checkpoints" / "step_00000005" / name
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(where * len(content)))] ^= 1 << bit
    path.write_bytes(content)
    try:
        loaded = saver.load(blank())
    except ValueError:
        return
    assert name == "manifest.json"
    assert loaded is not None
    assert (loaded.manifest.step, loaded.manifest.run) == (5, {"note": "newer"})
    assert_equal(loaded.state, state(2.0))


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    fresh = blank()
    fresh.sharded["weights/new"] = Shard(torch.zeros(2), (2,))
    with pytest.raises(ValueError, match="another model: weights/new"):
        checkpointer(tmp_path).load(fresh)


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/step_00000003"])
def test_a_run_or_one_of_its_checkpoints_can_be_named(below: str, tmp_path: Path) -> None:
    two_checkpoints(tmp_path / "run")
    loaded = checkpointer(tmp_path / "other").load(blank(), tmp_path / "run" / below)
    assert loaded is not None
    assert loaded.manifest.step == (3 if "step" in below else 5)
    assert not (tmp_path / "other").exists()


def test_a_named_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpointer(tmp_path).load(blank(), tmp_path)
