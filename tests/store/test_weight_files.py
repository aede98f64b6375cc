"""Files of weights: what lies where, its rows, and what is refused with one line."""

from __future__ import annotations

import json
import os
import pickle
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload_sparse.store import weight_files
from offload_sparse.store.weight_files import check_whole, read_rows, tensors_in


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(5, 3, 2, 2, generator=generator),
        "half": torch.randn(4, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
    }


def read(stored: Any, low: int = 0, high: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    shape = stored.shape or (1,)
    high = shape[0] if high is None else high
    out = torch.empty(high - low, *shape[1:], dtype=dtype or stored.dtype)
    read_rows(stored, low, high, out)
    return out if stored.shape else out[0]


@pytest.fixture(params=["safetensors", "torch", "nested", "shards", "index"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = some_tensors()
    if request.param == "safetensors":
        save_file(tensors, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"
    if request.param in ("shards", "index"):
        names = list(tensors)
        parts = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
        for part, held in parts.items():
            save_file({name: tensors[name] for name in held}, tmp_path / part)
        where = {name: part for part, held in parts.items() for name in held}
        index = tmp_path / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        return index if request.param == "index" else tmp_path
    nested = {"epoch": 3, "best_acc1": torch.tensor(76.1), "state_dict": tensors, "optimizer": {"state": {}}}
    torch.save(nested if request.param == "nested" else tensors, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_the_weights_of_a_folder_are_told_from_what_lies_beside_them(tmp_path: Path, name: str) -> None:
    """The files are those that transformers' Trainer leaves."""
    tensors = some_tensors()
    for other in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"other": torch.ones(1)}, tmp_path / other)
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    where = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")  # which nobody has fetched
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert {stored.path.name for stored in tensors_in(tmp_path).values()} == {name}
    assert tensors_in(tmp_path).keys() == tensors.keys()


def test_every_tensor_is_found_and_read_bit_for_bit(file: Path) -> None:
    tensors, found = some_tensors(), tensors_in(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(read(found[name]), tensor)


def test_rows_are_those_of_the_tensor_and_no_other_byte_is_read(tmp_path: Path) -> None:
    tensor = some_tensors()["conv.weight"]
    save_file({"w": tensor, "behind": torch.ones(9)}, tmp_path / "a.safetensors")
    stored = tensors_in(tmp_path)["w"]
    for low, high in combinations_with_replacement(range(6), 2):
        for dtype in (torch.float32, torch.float64):
            out = torch.empty(high - low, 3, 2, 2, dtype=dtype)
            assert read_rows(stored, low, high, out) == (high - low) * 12 * 4
            assert torch.equal(out, tensor[low:high].to(dtype))


def test_large_tensors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_BLOCK", 40)
    tensor = torch.randn(11, 7)
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    stored = tensors_in(tmp_path)["w"]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(read(stored, 2, 9, dtype), tensor[2:9].to(dtype))


def test_tensors_of_torch_that_are_views_are_read_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    torch.save({"t": whole.t(), "part": whole[1:3, 2:4], "tied": whole}, tmp_path / "a.pt")
    found = tensors_in(tmp_path / "a.pt")
    assert torch.equal(read(found["t"], 1, 5), whole.t()[1:5])
    assert torch.equal(read(found["part"]), whole[1:3, 2:4])
    assert torch.equal(read(found["tied"]), whole)


class Harmful:
    """Its pickle touches a file when it is opened as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def pickled_code(folder: Path) -> Path:
    torch.save({"w": torch.ones(2), "x": Harmful(folder / "ran")}, folder / "w.pt")
    return folder / "w.pt"


def plain_pickle(folder: Path) -> Path:
    (folder / "w.pkl").write_bytes(pickle.dumps(Harmful(folder / "ran")))
    return folder / "w.pkl"


def old_format(folder: Path) -> Path:
    torch.save({"w": torch.ones(2)}, folder / "w.pt", _use_new_zipfile_serialization=False)
    return folder / "w.pt"


def truncated(folder: Path, suffix: str, share: float) -> Path:
    path, save = folder / f"w.{suffix}", save_file if suffix == "safetensors" else torch.save
    save({"w": torch.ones(500)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def index(folder: Path, content: Any) -> Path:
    save_file({"w": torch.ones(2)}, folder / "one.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps(content))
    return folder


def index_of_itself(folder: Path) -> Path:
    return index(folder, {"weight_map": {"w": "m.safetensors.index.json"}})


def no_tensors(folder: Path) -> Path:
    torch.save({"epoch": 3}, folder / "w.pt")
    return folder / "w.pt"


def two_files(folder: Path) -> Path:
    for name in "ab":
        save_file({"w": torch.ones(2)}, folder / f"{name}.safetensors")
    return folder


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


BAD = {
    "pickled code": (pickled_code, "objects that are no tensors"),
    "a plain pickle": (plain_pickle, "before 1.6, or is a pickle"),
    "an old format": (old_format, "before 1.6"),
    "a truncated safetensors": (lambda f: truncated(f, "safetensors", 0.5), "no whole safetensors file"),
    "a truncated header": (lambda f: truncated(f, "safetensors", 0.01), "no whole safetensors file"),
    "a truncated torch file": (lambda f: truncated(f, "pt", 0.5), "no whole file of torch.save"),
    "an empty file": (lambda f: written(f, "w.safetensors", b""), "no whole safetensors file"),
    "a picture": (lambda f: written(f, "w.bin", b"\x89PNG\r\n" + bytes(90)), "no file of weights"),
    "a huge header": (lambda f: written(f, "w", b"\xff" * 64), "no file of weights"),
    "an empty archive": (lambda f: written(f, "w.zip", b"PK\x03\x04" + bytes(40)), "no whole file of torch"),
    "no tensors": (no_tensors, "holds no tensors by name"),
    "an empty folder": (lambda f: f, "holds no weights"),
    "two files without an index": (two_files, "no index"),
    "an index that leaves": (lambda f: index(f, {"weight_map": {"w": "../one.safetensors"}}), "own folder"),
    "an index of folders": (lambda f: index(f, {"weight_map": {"w": ".."}}), "no regular file"),
    "an index of itself": (index_of_itself, "no file of weights"),
    "an index without a map": (lambda f: index(f, [1]), "no index of shards"),
    "an index of other files": (lambda f: index(f, {"weight_map": {"w": "2.safetensors"}}), "not exist"),
    "an index of other names": (lambda f: index(f, {"weight_map": {"v": "one.safetensors"}}), "lacks 'v'"),
    "nothing": (lambda f: f / "nothing", "does not exist"),
    "a pipe": (pipe, "no regular file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_anything_else_is_one_line_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    make, words = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        tensors_in(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_changed_bit_of_a_torch_file_is_found(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(500)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    check_whole([tmp_path / "w.pt"])
    content[tensors_in(tmp_path)["w"].offset + 999] ^= 4
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt is damaged \(w/data/0\)"):
        check_whole([tmp_path / "w.pt"])


def test_a_file_that_has_shrunk_since_is_truncated(tmp_path: Path) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "a.safetensors")
    stored = tensors_in(tmp_path)["w"]
    os.truncate(stored.path, stored.offset + 40)
    with pytest.raises(ValueError, match="truncated"):
        read(stored)
