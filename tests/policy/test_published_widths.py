"""Published widths are of the networks that they name, and spend the budget in their own proportions."""

from functools import cache

import pytest
import torch
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.policy.budget import Budget
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.probe import present_widths
from offload_sparse.policy.published_widths import SHAPES, mask_of_shape, static_mask
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, small_map

MODELS = {
    "vgg16_cifar_filters": ("offload_sparse/vgg16_cifar", 32),
    "vgg19_cifar_slimming": ("offload_sparse/vgg19_cifar", 32),
    "mobilenetv1_metapruning": ("timm/mobilenetv1_100", 64),
    "resnet50_autoslim_570m": ("torchvision/resnet50", 64),
    "resnet50_autoslim_1g": ("torchvision/resnet50", 64),
    "resnet50_autoslim_2g": ("torchvision/resnet50", 64),
}


@cache
def costs(model: str, size: int, block: str = "1") -> tuple[ChannelMap, CostModel]:
    with torch.device("meta"):
        network = build_model(model, 1000, 3, size)
    image = (torch.empty(1, 3, size, size, device="meta"),)
    channel_map = block_atoms(discover(network, image), block)
    return channel_map, CostModel(network, channel_map, image)


def mask_at(
    name: str, model: str, size: int, rho: float, block: str = "1"
) -> tuple[Tensor, CostModel, list[int]]:
    channel_map, cost = costs(model, size, block)
    budget = Budget("flops", rho, channel_map.groups, cost, (0.001, 0.999))
    mask = mask_of_shape(name, channel_map, budget)
    return mask, cost, present_widths(mask, channel_map.groups).int().tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_each_fits_its_network_and_spends_the_budget(name: str) -> None:
    mask, cost, widths = mask_at(name, *MODELS[name], rho=0.1)
    whole, published = SHAPES[name]
    assert all(w <= f for w, f in zip(published, whole, strict=True))
    assert 0.097 * cost.dense_flops <= cost.flops(mask) <= 0.1 * cost.dense_flops
    shares = [w / p for w, p in zip(widths, published, strict=True) if p >= 40]
    assert max(shares) < 1.2 * min(shares), "their own proportions"


def test_vgg19_at_the_paper_s_smallest_budget_is_the_shape_of_the_study() -> None:
    """1.69 % of the FLOPs: late layers nearly gone."""
    _, _, widths = mask_at("vgg19_cifar_slimming", "offload_sparse/vgg19_cifar", 32, 0.0169)
    study = [9, 11, 23, 23, 45, 45, 41, 35, 20, 7, 4, 4, 4, 4, 4, 18]
    assert all(abs(a - b) <= 1 for a, b in zip(widths, study, strict=True)), widths


@pytest.mark.parametrize("name", ["vgg19_cifar_slimming", "mobilenetv1_metapruning"])
def test_atoms_of_several_channels_keep_the_shape_and_the_budget(name: str) -> None:
    """As on a CUDA device: widths are those of single channels, to an atom, and 4 channels are least."""
    rho = 0.0169 if name.startswith("vgg") else 0.05
    _, _, single = mask_at(name, *MODELS[name], rho)
    mask, cost, widths = mask_at(name, *MODELS[name], rho, "<=8")
    assert 0.95 * rho * cost.dense_flops <= cost.flops(mask) <= rho * cost.dense_flops
    run = [4 if size == 32 else 8 for size in SHAPES[name][0]]
    assert all(abs(w * r - n) <= 1.5 * r for w, r, n in zip(widths, run, single, strict=True)), widths


@pytest.mark.parametrize("widths", ["", "vgg19_cifar_slimming"])
def test_a_budget_without_room_for_the_least_widths_is_refused(widths: str) -> None:
    channel_map, cost = costs("offload_sparse/vgg19_cifar", 32, "16")
    config = PolicyConfig(rho=0.01, budget="flops")
    with pytest.raises(ValueError, match=r"0\.01 of the flops is below the 0\.0\d+ that remain") as error:
        static_mask(widths, config, channel_map, cost)
    assert "raise policy.rho or lower atoms.block" in str(error.value)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("resnet50_autoslim_570m", 570e6), ("resnet50_autoslim_1g", 1e9), ("resnet50_autoslim_2g", 2.006e9)],
)
def test_autoslim_widths_have_the_multiplications_that_their_names_say(name: str, flops: float) -> None:
    channel_map, cost = costs("torchvision/resnet50", 224)
    mask = torch.zeros(channel_map.num_atoms, dtype=torch.bool)
    for group, width in zip(channel_map.groups, SHAPES[name][1], strict=True):
        mask[group.start : group.start + width] = True
    found = cost.flops(mask) / 2
    assert found == pytest.approx(flops, rel=0.05)


def test_widths_may_be_given_one_by_one_and_none_narrow_evenly() -> None:
    net = SmallNet(widths=(12, 16))  # type: ignore[arg-type]
    channel_map = small_map(net)
    cost = CostModel(net, channel_map, (torch.empty(1, 2, 6, 6, device="meta"),))
    config = PolicyConfig(rho=0.5)
    found = present_widths(static_mask("3, 7", config, channel_map, cost), channel_map.groups)
    assert found.tolist() == [3, 7]
    assert present_widths(static_mask("", config, channel_map, cost), channel_map.groups).tolist() == [6, 8]
    for widths in ("3", "3 17", "0 4"):
        with pytest.raises(ValueError, match=r"give one width for each of the 2 groups of \[12, 16\]"):
            static_mask(widths, config, channel_map, cost)


def test_unknown_names_and_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of vgg16_cifar_filters"):
        mask_at("vgg", "offload_sparse/vgg16_cifar", 32, 0.1)
    with pytest.raises(ValueError, match="take the model that they are made for"):
        mask_at("vgg19_cifar_slimming", "offload_sparse/vgg16_cifar", 32, 0.1)
