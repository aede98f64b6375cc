"""Slice = mask for every network that the README lists, as the trainer checks it before a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.res2net import Bottle2neck
from timm.models.resnet import ResNet
from timm.models.sknet import SelectiveKernelBasic
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from offload_sparse.channels.accounting import count_parameters
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import MAX_PARAMETERS, check, reduced, self_test
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import Net, SmallNet, small_map

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
QUICK = {
    "offload_sparse/resnet20_cifar",
    "offload_sparse/resnet32_wide_cifar",
    "offload_sparse/vgg_small",
    "torchvision/resnet18",
}


# Of those that take seconds, by default the policy that narrows more; both of each kind of sum and of layer.
IN_DETAIL = [
    pytest.param(name, policy, marks=() if policy == "coupled" or name in QUICK else pytest.mark.slow)
    for name in SIZES
    for policy in ("coupled", "internal")
]


@pytest.mark.parametrize(("name", "residual"), IN_DETAIL)
def test_slice_equals_mask_to_ten_digits(name: str, residual: Residual) -> None:
    """Outputs and gradients in float64, on the model or, where it is large, on its narrow twin."""
    with torch.device("meta"):
        model = build_model(name, num_classes=5, in_channels=3, image_size=max(32, SIZES[name]))
    inputs = (torch.empty(2, 3, SIZES[name], SIZES[name], device="meta"),)
    found = discover(model, inputs, residual)
    result = self_test(model, inputs, found)
    assert result.error < 1e-10
    assert 0 < result.kept < found.num_atoms


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


class Between(nn.Module):
    """Two layers, and what its own code does between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.between = between
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu()))


BY_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda h: h.roll(1, 1),
    "gated by the first": lambda h: h * h.select(1, 0).sigmoid().unsqueeze(1),
    "picked": lambda h: h.index_select(1, torch.arange(h.shape[1])),
}


@pytest.mark.parametrize("kind", BY_PLACE)
@pytest.mark.parametrize("width", [8, 48])
def test_channels_that_are_taken_by_their_place_stay(kind: str, width: int) -> None:
    """Another one is there when some are gone, whatever the width, and whether or not the test draws such."""
    with pytest.raises(ValueError, match="no channel of Between can be dropped: first meets"):
        discover(Between(BY_PLACE[kind], width), (torch.zeros(2, 3, 4, 4),))


@pytest.mark.parametrize("width", [48, 64, 96, 128])
def test_widths_that_one_mask_may_not_tell_are_refused_too(width: int) -> None:
    """A half is not that of the channels that are left, but for masks that keep as many of each."""

    def halves(h: Tensor) -> Tensor:
        half = h.shape[1] // 2
        return torch.cat([h[:, :half], 2 * h[:, half:]], 1)

    model, inputs = Between(halves, width), (torch.zeros(2, 3, 4, 4),)
    with pytest.raises(ValueError, match="sizes that do not follow its channels"):
        self_test(model, inputs, discover(model, inputs))


class DropPath(nn.Module):
    """Drops samples; what its rate is called is its own affair."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


def test_what_a_network_draws_is_the_same_without_dropped_channels() -> None:
    model, inputs = Between(DropPath(), 8), (torch.zeros(2, 3, 4, 4),)
    found, states = discover(model, inputs), torch.get_rng_state()
    assert self_test(model, inputs, found).error < 1e-10
    assert torch.equal(torch.get_rng_state(), states)


def test_a_network_that_wants_so_many_channels_is_refused_in_a_line() -> None:
    def eight(h: Tensor) -> Tensor:
        assert h.shape[1] == 8, "eight channels"
        return h

    model, inputs = Between(eight, 8), (torch.zeros(2, 3, 4, 4),)
    with pytest.raises(ValueError, match=r"the narrow network does not run \(eight channels.*\); correct"):
        self_test(model, inputs, discover(model, inputs))


def test_a_network_that_cannot_be_checked_may_go_unchecked() -> None:
    """Kernels of experts know no float64."""

    def single(h: Tensor) -> Tensor:
        assert h.dtype == torch.float32, "float32 alone"
        return h

    model, inputs = Between(single, 8), (torch.zeros(2, 3, 4, 4),)
    with pytest.raises(ValueError, match=r"in float64 .*\(float32 alone.*\); .*Setup\(verify=False\)"):
        self_test(model, inputs, discover(model, inputs))


class Beginning(Between):
    """Says itself where gradients begin, as Wav2Vec2 does, whose first layers are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        if self.training:
            x.requires_grad = True
        return super().forward(x)


def test_a_network_that_says_where_gradients_begin_is_tested_from_there() -> None:
    model, inputs = Beginning(torch.tanh, 8), (torch.zeros(2, 3, 4, 4),)
    assert self_test(model, inputs, discover(model, inputs)).error < 1e-10


def test_passes_that_are_computed_again_for_gradients_are_tested_alike() -> None:
    """With what they make float32, as the networks of transformers do."""

    def scaled(h: Tensor) -> Tensor:
        return functional.dropout(h.float().square() * torch.full((1,), 2.0))

    model = Between(lambda h: checkpoint(scaled, h, use_reentrant=False), 8)
    inputs = (torch.zeros(2, 3, 4, 4),)
    assert self_test(model, inputs, discover(model, inputs)).error < 1e-10


def test_where_random_inputs_give_nan_those_near_the_example_do() -> None:
    net = Net(lambda n, x: n.b(n.a(x.log()).relu()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1))
    inputs = (torch.rand(1, 3, 4, 4) + 0.1,)
    assert self_test(net, inputs, discover(net, inputs)).error < 1e-10


class FromZeros(nn.Module):
    """Makes the state that its recurrent layer begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.recurrent, self.head = nn.Linear(16, 8), nn.GRU(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.inner(x).relu(), torch.zeros(1, x.shape[1], 6))[0])


def casting(cast: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(lambda n, x: n.b(n.a(cast(x)).relu()), a=nn.Linear(16, 8), b=nn.Linear(8, 5))


SINGLE: dict[str, tuple[nn.Module, Tensor]] = {
    "bytes": (casting(lambda x: x.float() / 255), torch.zeros(2, 5, 16, dtype=torch.uint8)),
    "classes": (casting(lambda x: one_hot(x, 16).to(torch.float32)), torch.zeros(2, 5, dtype=torch.int64)),
    "a norm": (casting(lambda x: x.to(dtype=torch.float).softmax(-1)), torch.zeros(2, 5, 16)),
    "a state": (FromZeros(), torch.zeros(2, 5, 16)),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_network_whose_code_says_float32_is_tested_in_float64(case: str) -> None:
    model, example = SINGLE[case]
    found = discover(model, (example,))
    assert self_test(model, (example,), found).error < 1e-10
    assert found.num_atoms == 8
    assert torch.get_default_dtype() == torch.float32


class SplitStream(nn.Module):
    """A stream of which one half goes on as it is and the other through residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = self.norm(self.stem(x)).relu().chunk(2, 1)
        x = x + self.inner(x).relu()
        return self.head(torch.cat([kept, x], 1).mean((2, 3)))


class Unequal(SplitStream):
    """The same with other sizes, written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        first, x, last = torch.split(self.norm(self.stem(x)).relu(), [4, 16, 12], 1)
        x = self.inner(x).relu() + x
        return self.head(torch.cat([last, x, first], 1).mean((2, 3)))


def small_resnet(block: type[nn.Module], width: int, **arguments: object) -> nn.Module:
    widths = (16, 16, 16, 16)
    return ResNet(block, [1] * 4, 5, channels=widths, base_width=width, stem_width=8, block_args=arguments)


SPLITTING: dict[str, Callable[[], nn.Module]] = {
    "a stream in halves": SplitStream,
    "a stream in parts of other sizes": Unequal,
    "widths in four": lambda: small_resnet(Bottle2neck, 64, scale=4),
    "inputs in two": lambda: small_resnet(
        SelectiveKernelBasic, 64, sk_kwargs={"rd_ratio": 0.25, "rd_divisor": 4, "split_input": True}
    ),
    "sums alone": lambda: timm.create_model("resnet10t", num_classes=5),
}


@pytest.mark.parametrize(
    ("kind", "residual"),
    [
        *((kind, policy) for kind in SPLITTING for policy in ("coupled", "filter")),
        *(pytest.param(k, "internal", marks=() if "stream" in k else pytest.mark.slow) for k in SPLITTING),
    ],
)
def test_a_twin_keeps_something_of_every_part_and_knows_its_sums(kind: str, residual: Residual) -> None:
    """A twin keeps the first atoms of each group: parts that a network splits off are groups of their own."""
    with torch.device("meta"):
        model = SPLITTING[kind]()
    inputs = (torch.empty(2, 3, 32, 32, device="meta"),)
    channel_map = discover(model, inputs, residual)
    twin, twin_map = reduced(model, channel_map, count_parameters(model) // 3)
    assert count_parameters(twin) < count_parameters(model)
    assert min(group.size for group in twin_map.groups) >= 2
    assert check(twin, inputs, twin_map).error < 1e-10


@pytest.mark.parametrize("network", [SplitStream, Unequal])
def test_parts_of_a_width_are_groups_of_their_own(network: type[nn.Module]) -> None:
    """Where an order of the channels has them as runs; the first atoms of each are what even widths keep."""
    model, inputs = network(), (torch.zeros(2, 3, 8, 8),)
    groups = discover(model, inputs).groups
    sizes = [16, 16] if network is SplitStream else [4, 16, 12]
    assert [group.size for group in groups] == sizes
    assert len({group.name for group in groups}) == len(sizes)
    assert all(group.name.startswith("stem[") for group in groups)
