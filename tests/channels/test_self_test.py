"""Slice = mask for every network that the README lists, as the trainer checks it before a run."""

from __future__ import annotations

import pytest
import torch

from offload_sparse.channels.accounting import count_parameters
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import MAX_PARAMETERS, reduced, self_test
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, small_map

SIZES = {
    "offload_sparse/vgg16_cifar": 32,
    "offload_sparse/vgg19_cifar": 32,
    "offload_sparse/resnet20_cifar": 16,
    "offload_sparse/resnet32_cifar": 16,
    "offload_sparse/resnet32_wide_cifar": 16,
    "offload_sparse/wrn28_10_cifar": 16,
    "offload_sparse/vgg_small": 16,
    "torchvision/resnet18": 32,
    "torchvision/resnet50": 64,
    "torchvision/vgg16_bn": 32,
    "torchvision/mobilenet_v2": 32,
    "torchvision/densenet121": 32,
    "timm/mobilenetv1_100": 32,
}


@pytest.mark.parametrize("residual", ["coupled", "internal"])
@pytest.mark.parametrize("name", SIZES)
def test_slice_equals_mask_to_ten_digits(name: str, residual: Residual) -> None:
    """Outputs and gradients in float64, on the model or, where it is large, on its narrow twin."""
    with torch.device("meta"):
        model = build_model(name, num_classes=5, in_channels=3, image_size=max(32, SIZES[name]))
    inputs = (torch.empty(2, 3, SIZES[name], SIZES[name], device="meta"),)
    result = self_test(model, inputs, discover(model, inputs, residual))
    assert result.error < 1e-10
    assert 0 < result.kept < result.atoms


def test_the_twin_is_small_keeps_every_layer_and_every_group() -> None:
    with torch.device("meta"):
        model = build_model("offload_sparse/wrn28_10_cifar")
    inputs = (torch.empty(1, 3, 32, 32, device="meta"),)
    channel_map = discover(model, inputs)
    twin, twin_map = reduced(model, channel_map, MAX_PARAMETERS)
    assert count_parameters(twin) <= MAX_PARAMETERS < count_parameters(model)
    assert [g.name for g in twin_map.groups] == [g.name for g in channel_map.groups]
    assert [n for n, _ in twin.named_modules()] == [n for n, _ in model.named_modules()]


def test_a_wrong_map_is_refused_on_the_twin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = SmallNet((32, 48))
    right = small_map(net)
    rows, columns, *window = right.axes["conv2.weight"]
    assert columns is not None
    wrong = {"conv2.weight": (rows, columns.flip(0), *window)}  # reads its input channels in reverse order
    channel_map = ChannelMap(right.groups, right.shapes, {**right.axes, **wrong})
    inputs = (torch.empty(2, 2, 6, 6),)
    assert count_parameters(reduced(net, channel_map, 4000)[0]) < count_parameters(net)
    with pytest.raises(ValueError, match="the channel map is wrong"):
        self_test(net, inputs, channel_map)
    monkeypatch.setattr("offload_sparse.channels.check.MAX_PARAMETERS", 4000)
    with pytest.raises(ValueError, match="the channel map is wrong"):
        self_test(net, inputs, channel_map)
