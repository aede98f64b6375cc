"""Tensors without their zeros: what comes back is what went in, and nonsense is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_sparse import load_pruned
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.export.sparse_tensors import decode, encode
from offload_sparse.workloads.models import build_model


def sparse(shape: tuple[int, ...], kept: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values * (torch.rand(shape, generator=generator) < kept)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_decoding_gives_the_tensors_that_were_encoded(
    shape: tuple[int, ...], kept: float, seed: int, dtype: torch.dtype
) -> None:
    tensors = {"a": sparse(shape, kept, seed, dtype), "count": torch.tensor(3)}
    stored, sparse_names = encode(tensors)
    found = decode(stored, sparse_names, {name: t.shape for name, t in tensors.items()})
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(("kept", "expected"), [(0.02, True), (0.9, False)])
def test_zeros_are_left_out_where_that_is_smaller(kept: float, expected: bool) -> None:
    tensor = sparse((300, 400), kept, 0)
    stored, names = encode({"a": tensor})
    assert bool(names) == expected
    assert (sum(t.nbytes for t in stored.values()) < tensor.nbytes) == expected


def test_indices_are_as_small_as_the_shape_allows() -> None:
    small, _ = encode({"a": sparse((10, 100), 0.1, 0)})
    assert small["a.columns"].dtype == torch.int16
    wide, _ = encode({"a": sparse((2, 70_000), 0.001, 0)})
    assert wide["a.columns"].dtype == torch.int32


SHAPES = {"a": (4, 100)}


def parts() -> dict[str, Tensor]:
    matrix = torch.zeros(4, 100)
    matrix[0, 1], matrix[1, 0] = 2.0, 3.0
    stored, names = encode({"a": matrix})
    assert names == ["a"]
    return stored


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("columns", torch.tensor([1, 100])),
        ("columns", torch.tensor([1, -1])),
        ("columns", torch.tensor([1.0, 0.0])),
        ("columns", torch.tensor([1])),
        ("columns", torch.tensor([[1, 0]])),
        ("values", torch.tensor([1, 2])),
        ("values", torch.tensor([1.0])),
        ("pointers", torch.tensor([0, 2, 1, 2, 2])),
        ("pointers", torch.tensor([0, 1, 2])),
        ("pointers", torch.tensor([1, 1, 2, 2, 2])),
        ("pointers", torch.tensor([0, 1, 2, 2, 10**12])),
        ("pointers", torch.tensor([False] * 5)),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match="'a'"):
        decode(parts() | {f"a.{part}": value}, ["a"], SHAPES)


def test_missing_parts_and_unknown_tensors_are_refused() -> None:
    stored = parts()
    with pytest.raises(ValueError, match="of 'b' are missing"):
        decode(stored, ["b"], SHAPES)
    del stored["a.columns"]
    with pytest.raises(ValueError, match="of 'a' are missing"):
        decode(stored, ["a"], SHAPES)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize("shape", [(4, 30_000_000_000 // 4), (4, 0), (0, 0), (4,), ()])
def test_a_declared_shape_out_of_proportion_allocates_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"out of all proportion|'a'"), Largest() as made:
        decode(parts(), ["a"], {"a": shape})
    assert made.entries < 1000


def test_tensors_that_a_reader_would_refuse_are_written_whole() -> None:
    stored, names = encode({"a": torch.zeros(1, 70_000_000)})
    assert (list(stored), names) == (["a"], [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = build_model("offload_sparse/lenet_300_100", 10, 1, 28)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.05)
    mask = torch.ones(0, dtype=torch.bool)
    arguments = {"in_channels": 1, "image_size": 28}
    model: dict[str, Any] = {"name": "offload_sparse/lenet_300_100", "arguments": arguments}
    FinalNetwork(network.eval(), mask, ChannelMap((), {}, {})).save(tmp_path, model)
    return tmp_path


def test_an_export_of_five_percent_of_the_weights_is_small_and_loads(folder: Path) -> None:
    assert (folder / "weights.safetensors").stat().st_size < 0.15 * 4 * 266_610
    assert sum(int((p != 0).sum()) for p in load_pruned(folder).parameters()) < 0.06 * 266_610


def test_a_damaged_sparse_export_is_refused_in_one_line(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["fc1.weight.columns"] = tensors["fc1.weight.columns"].clone()
    tensors["fc1.weight.columns"][0] = -5
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(ValueError, match="export it again"):
        load_pruned(folder)
    structure = json.loads((folder / "structure.json").read_text())
    structure["sparse"] = []
    (folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match="digest does not fit"):
        load_pruned(folder)
    del structure["digest"], structure["weights_digest"]  # as in an export written by hand
    (folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match="disagrees"):
        load_pruned(folder)
