"""The networks of the papers: sizes as published, widths that scale, initial weights as stated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from offload_sparse.workloads.models import build_model


def convolutions(network: nn.Module, kernel: int) -> list[nn.Conv2d]:
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (kernel,) * 2
    ]


def parameters(name: str, **arguments: float) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(f"offload_sparse/{name}", **arguments).parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vgg16_cifar", 14.72),
        ("vgg19_cifar", 20.04),
        ("resnet20_cifar", 0.27),
        ("resnet32_cifar", 0.47),
        ("wrn28_10_cifar", 36.48),  # 36.5 M in table 4 of Zagoruyko & Komodakis
        ("resnet18_cifar", 11.17),
        ("vgg16_dst_cifar", 14.99),
    ],
)
def test_parameter_counts_are_those_of_the_papers(name: str, millions: float) -> None:
    assert parameters(name) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "depth", "projections"),
    [
        ("vgg16_cifar", 13, 0),
        ("vgg19_cifar", 16, 0),
        ("vgg_small", 6, 0),
        ("resnet20_cifar", 19, 2),
        ("resnet32_cifar", 31, 2),
        ("wrn28_10_cifar", 25, 3),
        ("resnet18_cifar", 17, 3),
    ],
)
def test_depths_and_projection_shortcuts(name: str, depth: int, projections: int) -> None:
    with torch.device("meta"):
        network = build_model(f"offload_sparse/{name}")
    assert len(convolutions(network, 3)) == depth
    assert len(convolutions(network, 1)) == projections
    assert [type(m) for m in network.modules()].count(nn.Linear) == 1


@pytest.mark.parametrize(
    ("name", "weights", "parameters"),
    [("lenet_300_100", 266_200, 266_610), ("lenet5_caffe", 430_500, 431_080)],
)
def test_the_lenets_are_those_of_the_pruning_literature(name: str, weights: int, parameters: int) -> None:
    network = build_model(f"offload_sparse/{name}", 10, 1, 28)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in network.parameters() if p.dim() > 1) == weights
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_vgg_of_dynamic_sparse_training_has_two_linear_layers() -> None:
    with torch.device("meta"):
        network = build_model("offload_sparse/vgg16_dst_cifar")
    assert len(convolutions(network, 3)) == 13
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(512, 512), (10, 512)]


def test_the_wide_resnet32_has_doubled_channels() -> None:
    assert parameters("resnet32_wide_cifar") == parameters("resnet32_cifar", width=2.0)


@pytest.mark.parametrize(
    "name", ["vgg16_cifar", "resnet20_cifar", "resnet32_wide_cifar", "wrn28_10_cifar", "vgg_small"]
)
def test_width_multiplies_every_channel_count(name: str) -> None:
    with torch.device("meta"):
        full = convolutions(build_model(f"offload_sparse/{name}"), 3)
        half = convolutions(build_model(f"offload_sparse/{name}", width=0.5), 3)
        least = convolutions(build_model(f"offload_sparse/{name}", width=1e-6), 3)
    assert [2 * layer.out_channels for layer in half] == [layer.out_channels for layer in full]
    assert {layer.out_channels for layer in least} == {1}


@pytest.mark.parametrize("name", ["vgg_small", "resnet20_cifar"])
def test_convolutions_start_kaiming_normal_with_fan_out(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(f"offload_sparse/{name}", width=4.0)
    for layer in convolutions(network, 3)[1:]:
        expected = math.sqrt(2 / (9 * layer.out_channels))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert layer.bias is None


def test_every_network_reads_larger_images_than_it_was_made_for() -> None:
    for name in ("vgg_small", "resnet20_cifar", "vgg16_cifar"):
        with torch.device("meta"):
            assert build_model(f"offload_sparse/{name}")(torch.empty(2, 3, 48, 40)).shape == (2, 10)


def test_blocks_compute_the_residual_function_of_their_paper() -> None:
    """Recomputed from the layers: post-activation for ResNet, pre-activation for Wide ResNet."""
    torch.manual_seed(0)
    relu = torch.relu
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    basic = build_model("offload_sparse/resnet20_cifar", width=0.25).double().eval()
    block = basic.stages[1][0]  # type: ignore[index]
    x = relu(torch.randn(2, 4, 8, 8, dtype=torch.float64))
    expected = relu(block.bn2(block.conv2(relu(block.bn1(block.conv1(x))))) + block.downsample(x))
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)

    wide = build_model("offload_sparse/wrn28_10_cifar", width=0.0125).double().eval()
    out = wide.conv1(images)  # type: ignore[operator]
    first, second = wide.stages[0][0], wide.stages[0][1]  # type: ignore[index]
    a = relu(first.bn1(out))
    out = first.conv2(relu(first.bn2(first.conv1(a)))) + first.downsample(a)
    b = relu(second.bn1(out))
    expected = out + second.conv2(relu(second.bn2(second.conv1(b))))
    assert torch.allclose(second(first(wide.conv1(images))), expected, rtol=0, atol=1e-12)  # type: ignore[operator]
