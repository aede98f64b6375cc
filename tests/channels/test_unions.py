"""With ``residual="filter"`` every filter has its own mask, and a stream holds what any branch keeps."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from offload_sparse.channels.channel_map import ALWAYS, ChannelMap
from offload_sparse.channels.check import check, random_mask, self_test, zero_dropped
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import restrict
from offload_sparse.channels.stream_add import StreamAdd, expose_additions
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet
from tests.support.residual_nets import ResidualNet

IMAGES = (torch.zeros(2, 2, 6, 6),)


def net_and_map() -> tuple[ResidualNet, ChannelMap]:
    net = ResidualNet(width=5, hidden=4)
    return net, discover(net, IMAGES, residual="filter")


def members(channel_map: ChannelMap, number: int) -> list[int]:
    numbers, atoms = channel_map.unions
    return atoms[numbers == number - channel_map.num_atoms].tolist()


def test_every_layer_is_a_group_and_readers_of_the_stream_name_unions() -> None:
    """stem 0…4, first block 5…8 and 9…13, second block 14…17 and 18…22."""
    net, found = net_and_map()
    names = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
    assert [(g.name, g.size) for g in found.groups] == list(zip(names, (5, 4, 5, 4, 5), strict=True))
    assert found.axes["blocks.0.norm1.weight"][0].tolist() == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    second = found.axes["blocks.1.conv1.weight"][1]
    assert second is not None
    assert [members(found, u) for u in second.tolist()] == [[p, 9 + p] for p in range(5)]
    last = found.axes["norm.running_var"][0]
    assert last is not None
    assert [members(found, u) for u in last.tolist()] == [[p, 9 + p, 18 + p] for p in range(5)]
    assert found.axes["head.weight"][1].tolist() == last.repeat_interleave(4).tolist()  # type: ignore[union-attr]
    assert found.axes["blocks.1.conv2.weight"][0].tolist() == list(range(18, 23))  # type: ignore[union-attr]
    assert set(found.additions) == {"blocks.0.stream_add_0", "blocks.1.stream_add_0"}
    assert not any(isinstance(m, StreamAdd) for m in net.modules()), "the model is left as it was"


def test_without_additions_the_policy_is_the_coupled_one() -> None:
    filtered, coupled = (discover(SmallNet(), IMAGES, residual=r) for r in ("filter", "coupled"))  # type: ignore[arg-type]
    assert filtered.to_json() == coupled.to_json()


MODELS = [
    ("offload_sparse/resnet20_cifar", 32),
    ("torchvision/resnet18", 32),
    ("torchvision/mobilenet_v2", 32),
]


@cache
def model_and_map(name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...], ChannelMap]:
    with torch.device("meta"):
        model = build_model(name)
    images = (torch.zeros(2, 3, size, size),)
    return model, images, discover(model, images, residual="filter")


def assert_slice_is_mask(name: str, size: int) -> None:
    model, images, channel_map = model_and_map(name, size)
    found = check(model, images, channel_map, rho=0.25)
    assert found.error < 1e-10
    assert 0 < found.kept < channel_map.num_atoms


@pytest.mark.parametrize(("name", "size"), MODELS)
def test_slice_is_mask(name: str, size: int) -> None:
    assert_slice_is_mask(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/resnet50", 64),
        ("torchvision/efficientnet_b0", 64),
        ("offload_sparse/resnet32_wide_cifar", 32),
        ("offload_sparse/wrn28_10_cifar", 32),
        ("timm/resnet26d", 64),
    ],
)
def test_slice_is_mask_for_large_networks(name: str, size: int) -> None:
    assert_slice_is_mask(name, size)


def test_a_union_that_lacks_a_member_is_caught() -> None:
    net, found = net_and_map()
    last = found.axes["norm.weight"][0]
    assert last is not None
    two = found.axes["blocks.1.norm1.weight"][0]
    axes = {  # the head and its norm do not see what the second block adds
        name: tuple(two if a is last else a for a in of_tensor) for name, of_tensor in found.axes.items()
    }
    axes["head.weight"] = (None, two.repeat_interleave(4))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="channel map is wrong"):
        check(net, IMAGES, replace(found, axes=axes))


@pytest.mark.parametrize(("name", "size"), MODELS[:1])
def test_no_tensor_is_wider_than_the_channels_alive(name: str, size: int) -> None:
    """Every layer and every sum of the narrow network has just the channels that are not zero in the masked
    one.
    """
    _, _, channel_map = model_and_map(name, size)
    full = expose_additions(build_model(name)).double()
    for norm in (m for m in full.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(norm.bias, 3.0)  # or an alive channel could be zero by chance after its ReLU
    mask = random_mask(channel_map, 0.25, torch.Generator().manual_seed(0))
    narrow = narrow_module(full, channel_map, mask)
    zero_dropped(full, channel_map, mask)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    widths = {n: t.shape[1] for n, t in outputs(narrow, x).items()}
    alive = {n: int((t != 0).transpose(0, 1).flatten(1).any(1).sum()) for n, t in outputs(full, x).items()}
    assert widths == alive
    sums = {n: w for n, w in widths.items() if "stream_add" in n}
    full_width = {n: channel_map.additions[n].out.numel() for n in sums}
    assert all(w < full_width[n] for n, w in sums.items())


def outputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of all layers and sums, taken before an activation can change them in place."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> nn.Module:
        return lambda _module, _inputs, output: found.__setitem__(name, output.detach().clone())  # type: ignore[return-value]

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, StreamAdd)):
            module.register_forward_hook(note(name))  # type: ignore[arg-type]
    network(x)
    return found


def test_narrowing_a_narrow_network_is_narrowing_once() -> None:
    net, found = net_and_map()
    net.double().eval()
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        first = random_mask(found, 0.7, generator)
        inner = restrict(found, first)
        second = random_mask(inner, 0.6, generator)
        both = first.clone()
        both[first.nonzero().flatten()[~second]] = False
        twice = narrow_module(narrow_module(net, found, first), inner, second)
        once = narrow_module(net, found, both)
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
        assert torch.equal(twice(x), once(x))
        assert restrict(inner, second).to_json() == restrict(found, both).to_json()


def test_groups_of_one_name_keep_their_own_widths() -> None:
    """As a matrix has that no layer makes, whose rows and columns can both be dropped."""
    net, found = net_and_map()
    same = replace(found, groups=tuple(replace(group, name="w") for group in found.groups))
    mask = torch.arange(found.num_atoms) % 2 == 0
    assert [g.size for g in restrict(same, mask).groups] == [g.size for g in restrict(found, mask).groups]
    assert self_test(net, IMAGES, same).error < 1e-10


class DenseEnd(nn.Module):
    """Returns its stream, which therefore stays dense, while the branches are still sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.hidden = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.last(self.hidden(x).relu())


def test_a_stream_that_leaves_the_network_stays_whole() -> None:
    net = DenseEnd()
    found = discover(net, IMAGES, residual="filter")
    assert [g.name for g in found.groups] == ["stem", "hidden", "last"]
    assert found.additions["stream_add_0"].out.tolist() == [ALWAYS] * 6
    assert check(net, IMAGES, found).error < 1e-10


class PartlyAdded(nn.Module):
    """Adds its input to some channels of a branch; the places of these are written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.branch(x).relu()
        return self.head(torch.cat([y[:, :6] + x, y[:, 6:]], 1).mean((2, 3)))


def test_places_behind_an_addition_are_fitted_too() -> None:
    net = PartlyAdded()
    found = discover(net, IMAGES, residual="filter")
    assert [view.call for view in found.views[""]] == [0, 1]
    assert check(net, IMAGES, found).error < 1e-10


class Repeated(ResidualNet):
    """Runs one block twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.pool(self.blocks[0](self.blocks[0](x))).flatten(1))


class Dropped(ResidualNet):
    """Drops its branch by a function, which is no addition as others are once its rate is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.blocks[0].conv2(self.blocks[0].conv1(a).relu())
        return self.head(self.pool(a + stochastic_depth(b, self.drop_prob, "row", self.training)).flatten(1))


class Branching(ResidualNet):
    """Adds where torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.blocks[0].conv2(self.blocks[0].conv1(a))
        a = a + b if a.shape[0] > 1 and float(x.sum() * 0) == 0 else a
        return self.head(self.pool(a).flatten(1))


class InPlace(ResidualNet):
    """Adds in place to what it reads again."""

    def __init__(self, add: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.blocks[0].conv2(self.blocks[0].conv1(a).relu())
        self.add(b, a)
        return self.head(self.pool(b.relu()).flatten(1))


class Scaled(ResidualNet):
    """Multiplies the stream by a layer of its own after the addition, which ties the two."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        a = (a + self.blocks[0].conv2(self.blocks[0].conv1(a))) * self.blocks[1].conv2(
            self.blocks[1].conv1(a)
        )
        return self.head(self.pool(a).flatten(1))


class Behind(ResidualNet):
    """Reads the sum by a layer that takes several of its channels as one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(width=6)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        a = self.layer(a + self.blocks[0].conv2(self.blocks[0].conv1(a)))
        return self.head(self.pool(a).flatten(1))


IN_PLACE = "addition in .* in place to what is read again"


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Repeated(), "addition in .* runs twice"),
        (Dropped(), "addition in .* that depends on the training mode"),
        (Branching(), "addition in .* torch.fx cannot trace"),
        (InPlace(lambda y, x: y.add_(x)), IN_PLACE),
        (InPlace(operator.iadd), IN_PLACE),
        (InPlace(lambda y, x: y.flatten(1).add_(x.flatten(1))), IN_PLACE),
        (Scaled(), "sum in the network is tied to other channels"),
        (Behind(nn.GroupNorm(2, 6)), "sum in the network is tied to other channels"),
        (Behind(nn.Conv2d(6, 6, 1, groups=2)), "sum in the network is tied to other channels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_streams_that_cannot_be_followed_are_refused_with_advice(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*residual=coupled"):
        discover(net, IMAGES, residual="filter")
    assert discover(copy.deepcopy(net), IMAGES, residual="coupled").num_atoms
