"""The exported network is the network that was trained, and a damaged export is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from offload_sparse import load_pruned
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, small_map
from tests.support.ranks import run_ranks

ARGUMENTS = {"num_classes": 5, "in_channels": 1, "image_size": 16, "width": 0.5}


@pytest.fixture(scope="module")
def network() -> FinalNetwork:
    torch.manual_seed(0)
    full = build_model("offload_sparse/vgg_small", **ARGUMENTS)
    channel_map = discover(full, (torch.empty(1, 1, 16, 16),))
    mask = torch.rand(channel_map.num_atoms) < 0.5
    mask[[group.start for group in channel_map.groups]] = True
    return FinalNetwork(narrow_module(full, channel_map, mask).eval(), mask, channel_map)


@pytest.fixture
def folder(network: FinalNetwork, tmp_path: Path) -> Path:
    network.save(tmp_path / "model", {"name": "offload_sparse/vgg_small", "arguments": ARGUMENTS})
    return tmp_path / "model"


def test_a_network_comes_back_bit_for_bit_and_ready_for_evaluation(
    network: FinalNetwork, folder: Path
) -> None:
    loaded = load_pruned(folder)
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(loaded(images), network.module(images))
    assert not loaded.training
    assert all(p.device.type == "cpu" and p.is_contiguous() for p in loaded.parameters())


def test_the_structure_names_the_kept_channels_of_every_group(network: FinalNetwork, folder: Path) -> None:
    groups = json.loads((folder / "structure.json").read_text())["groups"]
    for group in network.channel_map.groups:
        kept = network.mask[group.start : group.stop].nonzero().flatten().tolist()
        assert groups[group.name] == {"size": group.size, "kept": kept}


def test_arguments_that_json_cannot_hold_cost_no_earlier_network(network: FinalNetwork, folder: Path) -> None:
    model = {"name": "offload_sparse/vgg_small", "arguments": ARGUMENTS | {"act_layer": nn.ReLU}}
    with pytest.raises(ValueError, match="a value of type type cannot be written as JSON"):
        network.save(folder, model)
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(load_pruned(folder)(images), network.module(images))


def test_a_users_own_model_is_loaded_through_its_constructor(tmp_path: Path) -> None:
    full = SmallNet()
    channel_map = small_map(full)
    mask = channel_map.uniform_mask(0.5)
    narrow = narrow_module(full, channel_map, mask).eval()
    FinalNetwork(narrow, mask, channel_map).save(tmp_path)
    images = torch.randn(2, 2, 6, 6)
    assert torch.equal(load_pruned(tmp_path, model=SmallNet)(images), narrow(images))
    with pytest.raises(ValueError, match="pass `model`"):
        load_pruned(tmp_path)


def saved_by_every_rank(folder: str) -> list[float]:
    torch.manual_seed(0)
    full = SmallNet()
    channel_map = small_map(full)
    mask = channel_map.uniform_mask(0.5)
    final = FinalNetwork(narrow_module(full, channel_map, mask).eval(), mask, channel_map)
    differences = []
    for number in range(10):
        torch.nn.init.constant_(final.module.get_parameter("conv1.weight"), number)
        dist.barrier()
        final.save(folder)
        weight = load_pruned(folder, SmallNet).get_parameter("conv1.weight").detach()
        differences.append(float((weight - number).abs().max()))
    return differences


def test_ranks_that_all_save_to_one_folder_take_turns(tmp_path: Path) -> None:
    """As in the README: every rank saves, and what it then reads is whole."""
    assert run_ranks(3, saved_by_every_rank, str(tmp_path)) == [[0.0] * 10] * 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["structure.json", "weights.safetensors"]


def damage(folder: Path, how: str) -> None:
    weights, structure = folder / "weights.safetensors", folder / "structure.json"
    data = json.loads(structure.read_text())
    if how == "no structure":
        structure.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "half a structure":
        structure.write_text(structure.read_text()[:100])
    elif how == "half the weights":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "another format":
        structure.write_text(json.dumps(data | {"format": 99}))
    elif how == "another shape":
        data["tensors"][next(iter(data["tensors"]))] = [1, 2, 3]
        structure.write_text(json.dumps(data))
    elif how == "another model":
        structure.write_text(json.dumps(data | {"model": {"name": "offload_sparse/vgg19_cifar"}}))
    elif how == "an unknown model":
        structure.write_text(json.dumps(data | {"model": {"name": "os/system"}}))


@pytest.mark.parametrize(
    "how",
    [
        "no structure",
        "no weights",
        "half a structure",
        "half the weights",
        "another format",
        "another shape",
        "another model",
        "an unknown model",
    ],
)
def test_a_damaged_export_is_one_line_of_advice(folder: Path, how: str) -> None:
    damage(folder, how)
    with pytest.raises(ValueError) as error:
        load_pruned(folder)
    assert "\n" not in str(error.value)
