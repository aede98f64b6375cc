"""``verify`` measures slice = mask in float64; ``check`` accepts right maps only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.channels.check import TOLERANCE, check, random_mask, self_test, verify, zero_dropped
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.specs import MapBuilder
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, channel_maps
from tests.support.channel_maps import small_map as map_by_hand

IMAGES = (torch.zeros(2, 2, 8, 8),)
WHOLE = [
    ("torchvision/resnet18", 64),
    ("torchvision/mobilenet_v2", 32),
    ("torchvision/densenet121", 32),
    ("torchvision/vgg16_bn", 64),
    ("torchvision/resnet50", 64),
    ("timm/mobilenetv1_100", 64),
    ("offload_sparse/resnet20_cifar", 32),
    ("offload_sparse/resnet32_wide_cifar", 32),
    ("offload_sparse/wrn28_10_cifar", 32),
    ("offload_sparse/vgg16_cifar", 32),
    ("offload_sparse/vgg19_cifar", 32),
    ("offload_sparse/vgg_small", 28),
]


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["coupled", "internal"])
@pytest.mark.parametrize(("name", "size"), WHOLE)
def test_slice_is_mask_of_the_whole_network(name: str, size: int, residual: Residual) -> None:
    """By default narrow twins are tested, and small networks as they are; see ``test_self_test``."""
    with torch.device("meta"):
        model = build_model(name)
    inputs = (torch.zeros(2, 3, size, size),)
    channel_map = discover(model, inputs, residual)
    found = check(model, inputs, channel_map, rho=0.25)
    assert found.error < 1e-10 < TOLERANCE
    assert 0 < found.kept < channel_map.num_atoms


def small_map() -> ChannelMap:
    return discover(SmallNet(), IMAGES)


def with_axis(channel_map: ChannelMap, tensor: str, axis: Tensor) -> ChannelMap:
    """The map with another last axis of a tensor."""
    axes = list(channel_map.axes[tensor])
    axes[max(dim for dim, known in enumerate(axes) if known is not None)] = axis
    return replace(channel_map, axes={**channel_map.axes, tensor: tuple(axes)})


def test_a_right_map_is_exact_in_both_modes() -> None:
    found = verify(SmallNet(), IMAGES, small_map(), rho=0.5)
    assert max(found.output_error, found.gradient_error) == found.error < 1e-10
    assert 0 < found.kept < 14


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_map_by_hand_that_sessions_of_tests_take_is_right(batch_norm: bool) -> None:
    net = SmallNet(batch_norm=batch_norm)
    assert self_test(net, IMAGES, map_by_hand(net)).error < 1e-10


@pytest.mark.parametrize("tensor", ["conv2.weight", "head.weight"])
def test_permuted_columns_fail_and_the_worst_tensor_is_named(tensor: str) -> None:
    columns = small_map().axes[tensor][1]
    assert columns is not None
    with pytest.raises(ValueError, match=r"slice differs from mask: .*\((train|eval) mode\) is off by"):
        check(SmallNet(), IMAGES, with_axis(small_map(), tensor, columns.flip(0)))


@pytest.mark.parametrize("pair", [(0, 1), (2, 5), (6, 13)])
def test_two_swapped_channels_fail(pair: tuple[int, int]) -> None:
    tensor = "conv2.weight" if pair[1] < 6 else "head.weight"
    right = small_map().axes[tensor][1]
    assert right is not None
    wrong = right.clone()
    wrong[right == pair[0]], wrong[right == pair[1]] = pair[1], pair[0]
    with pytest.raises(ValueError, match="slice differs from mask"):
        check(SmallNet(), IMAGES, with_axis(small_map(), tensor, wrong))


@pytest.mark.parametrize("pair", [(3, 4), (3, 6), (20, 30), (50, 52)])
def test_two_swapped_channels_of_a_wide_layer_fail(pair: tuple[int, int]) -> None:
    """Of which a mask that is drawn keeps both, or neither, as often as not."""
    net, wrong = SmallNet((64, 40)), torch.arange(64)
    wrong[list(pair)] = wrong[list(pair[::-1])]
    with pytest.raises(ValueError, match="slice differs from mask"):
        check(net, IMAGES, with_axis(discover(net, IMAGES), "conv2.weight", wrong))


def test_permuted_running_statistics_fail_in_evaluation_mode() -> None:
    wrong = with_axis(small_map(), "norm1.running_var", torch.tensor([5, 4, 3, 2, 1, 0]))
    found = verify(SmallNet(), IMAGES, wrong)
    assert found.output_error > TOLERANCE
    assert "(eval mode)" in found.worst


def test_a_narrow_network_that_does_not_run_fails() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    found = discover(net, IMAGES)
    axes = {**found.axes, "2.weight": (None, None, None, None)}
    with pytest.raises(ValueError, match="does not run"):
        check(net, IMAGES, replace(found, axes=axes))


def test_a_narrow_network_with_other_outputs_fails() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1))
    shapes = {"0.weight": (4, 2, 1, 1), "0.bias": (4,)}
    axes = {"0.weight": (torch.arange(4), None, None, None), "0.bias": (torch.arange(4),)}
    with pytest.raises(ValueError, match="outputs have shapes"):
        check(net, IMAGES, ChannelMap((Group("0", 0, 4),), shapes, axes))


def test_a_map_of_another_network_fails() -> None:
    with pytest.raises(ValueError, match="of another network"):
        check(nn.Sequential(nn.Conv2d(2, 4, 1)), IMAGES, small_map())


def test_an_activation_that_revives_dropped_channels_fails() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 3, 1))
    builder = MapBuilder(net)
    builder.width(("0",), "2")
    with pytest.raises(ValueError, match="does not vanish"):
        check(net, IMAGES, builder.build())


def test_dropout_is_switched_off_for_the_test() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 3, 1))
    check(net, IMAGES, discover(net, IMAGES))
    assert net[1].p == 0.5


def test_the_model_is_left_as_it_was_and_values_come_from_the_seed() -> None:
    model = SmallNet().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first = verify(model, IMAGES, small_map())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert verify(SmallNet(), IMAGES, small_map()) == first


def test_columns_that_read_dropped_channels_stay_and_producers_are_zero() -> None:
    model, channel_map = SmallNet(), small_map()
    mask = channel_map.full_mask()
    mask[[1, 8]] = False
    columns = model.conv2.weight[:, 1].clone()
    columns[2] = 0  # atom 8 is filter 2 of conv2
    zero_dropped(model, channel_map, mask)
    assert torch.equal(model.conv2.weight[:, 1], columns)
    for tensor in (model.conv1.weight[1], model.conv1.bias[1], model.norm1.weight[1], model.conv2.weight[2]):
        assert not bool(tensor.any())
    assert bool(model.conv1.weight[0].any())


@given(channel_maps(), st.floats(0.01, 0.99), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_random_masks_are_trivial_in_no_group(channel_map: ChannelMap, rho: float, seed: int) -> None:
    mask = random_mask(channel_map, rho, torch.Generator().manual_seed(seed))
    for group in channel_map.groups:
        kept = mask[group.start : group.stop].nonzero().flatten().tolist()
        assert kept
        assert group.size == 1 or len(kept) < group.size
        assert group.size < 3 or kept[-1] - kept[0] >= len(kept), (
            "neighbours in the slice are none in the network"
        )


@pytest.mark.parametrize("rho", [0.0, -0.5, 1.5])
def test_rho_outside_its_range_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        verify(SmallNet(), IMAGES, small_map(), rho=rho)
