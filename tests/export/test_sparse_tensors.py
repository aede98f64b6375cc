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

from offload_sparse import load_pruned
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.export.description import ExportLayout
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.export.sparse_tensors import decode, encode
from offload_sparse.workloads.models import build_model

LAYOUTS: tuple[ExportLayout, ...] = ("auto", "dense", "coo", "csr")


def sparse(shape: tuple[int, ...], kept: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values * (torch.rand(shape, generator=generator) < kept)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 50),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_decoding_gives_the_tensors_that_were_encoded(
    shape: tuple[int, ...], kept: float, seed: int, layout: ExportLayout, dtype: torch.dtype
) -> None:
    tensors = {"a": sparse(shape, kept, seed, dtype), "count": torch.tensor(3)}
    stored, layouts = encode(tensors, layout)
    found = decode(stored, layouts, {name: t.shape for name, t in tensors.items()})
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(("kept", "expected"), [(0.02, True), (0.9, False)])
def test_auto_leaves_zeros_out_where_that_is_smaller(kept: float, expected: bool) -> None:
    tensor = sparse((300, 400), kept, 0)
    stored, layouts = encode({"a": tensor}, "auto")
    assert bool(layouts) == expected
    assert (sum(t.nbytes for t in stored.values()) < tensor.nbytes) == expected


def test_indices_are_as_small_as_the_shape_allows() -> None:
    small, _ = encode({"a": sparse((10, 100), 0.1, 0)}, "csr")
    assert small["a.columns"].dtype == torch.int16
    wide, _ = encode({"a": sparse((2, 70_000), 0.001, 0)}, "csr")
    assert wide["a.columns"].dtype == torch.int32


def parts(layout: ExportLayout) -> tuple[dict[str, Tensor], dict[str, str], dict[str, tuple[int, ...]]]:
    stored, layouts = encode({"a": torch.tensor([[0.0, 2.0], [3.0, 0.0]])}, layout)
    return stored, layouts, {"a": (2, 2)}


@pytest.mark.parametrize(
    ("layout", "part", "value"),
    [
        ("coo", "index", torch.tensor([1, 9])),
        ("coo", "index", torch.tensor([1, -1])),
        ("coo", "index", torch.tensor([1.0, 2.0])),
        ("coo", "index", torch.tensor([1])),
        ("coo", "values", torch.tensor([1, 2])),
        ("csr", "columns", torch.tensor([1, 2])),
        ("csr", "columns", torch.tensor([1])),
        ("csr", "pointers", torch.tensor([0, 2, 1])),
        ("csr", "pointers", torch.tensor([0, 1])),
        ("csr", "pointers", torch.tensor([1, 1, 2])),
        ("csr", "pointers", torch.tensor([0, 1, 10**12])),
    ],
)
def test_parts_that_do_not_fit_are_refused(layout: ExportLayout, part: str, value: Tensor) -> None:
    stored, layouts, shapes = parts(layout)
    stored[f"a.{part}"] = value
    with pytest.raises(ValueError, match="'a'"):
        decode(stored, layouts, shapes)


def test_missing_parts_and_unknown_layouts_are_refused() -> None:
    stored, layouts, shapes = parts("coo")
    with pytest.raises(ValueError, match="unknown"):
        decode(stored, {"a": "pickle"}, shapes)
    with pytest.raises(ValueError, match="unknown"):
        decode(stored, {"b": "coo"}, shapes)
    with pytest.raises(ValueError, match="no mapping"):
        decode(stored, ["a"], shapes)  # type: ignore[arg-type]
    del stored["a.index"]
    with pytest.raises(ValueError, match=r"a\.index is missing"):
        decode(stored, layouts, shapes)


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
    del structure["layouts"]
    (folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match="digest does not fit"):
        load_pruned(folder)
    del structure["digest"], structure["weights_digest"]  # as in an export written by hand
    (folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match="disagree"):
        load_pruned(folder)
