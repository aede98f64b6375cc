"""The closed form of FLOPs and parameters equals counting on the narrow network, exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from offload_sparse.channels.accounting import CostModel, count_flops, count_parameters, train_cost_saving
from offload_sparse.channels.attention import HeadAttention
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import random_mask
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.specs import MapBuilder
from offload_sparse.channels.subnet import meta_copy, narrow_module
from tests.support.channel_maps import Net, SmallNet
from tests.support.language_models import (
    WORDS,
    LanguageModel,
    SeparateAttention,
    SlicedAttention,
    TorchEncoder,
)

IMAGE = (torch.zeros(1, 3, 64, 64),)


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("vgg16_bn", "coupled"),
        ("resnet18", "coupled"),
        ("resnet18", "filter"),
        ("densenet121", "coupled"),
        *(pytest.param("mobilenet_v2", policy, marks=pytest.mark.slow) for policy in ("coupled", "filter")),
    ],
)
def test_costs_of_random_masks_are_those_of_the_narrow_network(name: str, residual: Residual) -> None:
    model = torchvision.models.get_model(name, num_classes=10).to("meta")
    channel_map = discover(model, IMAGE, residual)
    cost = CostModel(model, channel_map, IMAGE)
    assert (cost.dense_flops, cost.dense_parameters) == (count_flops(model, IMAGE), count_parameters(model))
    mask = random_mask(channel_map, 0.3, torch.Generator().manual_seed(0))
    narrow = narrow_module(model, channel_map, mask)
    assert cost.flops(mask) == count_flops(narrow, IMAGE)
    assert cost.parameters(mask) == count_parameters(narrow)


def test_the_full_mask_costs_as_much_as_the_dense_network() -> None:
    images = (torch.zeros(3, 2, 8, 8),)
    model = SmallNet(widths=(6, 8), classes=4)
    channel_map = discover(model, images)
    cost = CostModel(model, channel_map, images)
    by_hand = 2 * 3 * (64 * (6 * 2 * 9 + 8 * 6 * 9) + 4 * 32)
    assert cost.flops(channel_map.full_mask()) == cost.dense_flops == by_hand
    assert cost.parameters(channel_map.full_mask()) == count_parameters(model)


WITH_OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(timm.create_model, "resnet18", num_classes=10),
    "mobilenetv1_100": partial(timm.create_model, "mobilenetv1_100", num_classes=10),
    "test_vit": partial(timm.create_model, "test_vit", num_classes=10, img_size=64),
    "attention of torch": partial(torchvision.models.VisionTransformer, 64, 16, 2, 4, 32, 64, num_classes=10),
    "transposed convolution": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_outputs_of_a_mask_are_those_of_the_layers_of_the_narrow_network(name: str) -> None:
    model = WITH_OUTPUTS[name]().to("meta")
    channel_map = discover(model, IMAGE)
    cost = CostModel(model, channel_map, IMAGE)
    mask = random_mask(channel_map, 0.3, torch.Generator().manual_seed(0))
    narrow, made = narrow_module(model, channel_map, mask).eval(), []
    for layer in narrow.modules():
        if isinstance(layer, HeadAttention):
            heads, width = layer.in_proj_weight.shape
            layer.register_forward_hook(lambda m, x, y, n=heads / width: made.append(y[0].numel() * n))
        elif isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda layer, given, output: made.append(output.numel()))
    narrow(IMAGE[0].to("meta"))
    assert made
    assert cost.outputs(mask) == pytest.approx(sum(made))


def between(run: Callable[[Any, Tensor], Tensor], **layers: Any) -> Net:
    """Layers of 8 channels from 3 to 5, and what is done between them."""
    first, last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
    return Net(lambda n, x: n.last(run(n, n.first(x))), first=first, last=last, **layers)


def shared() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    return between(lambda n, x: n.b(n.a(x)), a=nn.Sequential(layer, nn.ReLU()), b=nn.Sequential(layer))


def tied() -> nn.Module:
    net = between(lambda n, x: n.b(n.a(x).relu()), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))
    net.b.weight = net.a.weight
    return net


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def computed() -> nn.Module:
    net = between(lambda n, x: n.a(x), a=nn.Conv2d(8, 8, 1))
    nn.utils.parametrize.register_parametrization(net.a, "weight", Doubled())
    return net


class Core(nn.Module):
    """The part of an attention that has no weights."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class CoredAttention(SeparateAttention):
    def __init__(self) -> None:
        super().__init__(24, 4)
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(self.core(q, k, v).transpose(1, 2).flatten(2))


class NarrowValues(nn.Module):
    """One head, of which only the values can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 3 * 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(*self.qkv(x.flatten(2).mT).chunk(3, 2))
        return self.project(y).mT.unflatten(2, x.shape[2:])


BY_WEIGHT: dict[str, Callable[[], nn.Module]] = {
    "one layer under two parents": shared,
    "one weight of two layers": tied,
    "a computed weight": computed,
    "two weights of one module": lambda: between(
        lambda n, x: functional.conv2d(functional.conv2d(x, n.a), n.b).relu(),
        a=nn.Parameter(torch.ones(6, 8, 3, 3)),
        b=nn.Parameter(torch.ones(8, 6, 1, 1)),
    ),
    "beside a weight without entries": lambda: between(
        lambda n, x: n.a(x), a=nn.Conv2d(8, 8, 1), b=nn.Parameter(torch.ones(0, 8))
    ),
    "a sum of products": lambda: between(
        lambda n, x: torch.einsum("bchw,co->bohw", x, n.a), a=nn.Parameter(torch.ones(8, 8))
    ),
    "attention whose values are narrowed": lambda: between(lambda n, x: n.a(x), a=NarrowValues()),
    "attention in a module of its own": lambda: LanguageModel(CoredAttention),
    "grouped queries": lambda: LanguageModel(lambda: SlicedAttention(24, 6, 3)),
    "attention of torch": WITH_OUTPUTS["attention of torch"],
    "attention of timm": WITH_OUTPUTS["test_vit"],
}


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_flops_go_with_the_weight_that_is_multiplied(name: str) -> None:
    model = meta_copy(BY_WEIGHT[name]())
    inputs = (torch.zeros(1, 7, dtype=torch.int64),) if isinstance(model, LanguageModel) else IMAGE
    channel_map = discover(model, inputs)
    cost = CostModel(model, channel_map, inputs)
    for seed in range(3):
        mask = random_mask(channel_map, 0.5, torch.Generator().manual_seed(seed))
        narrow = narrow_module(model, channel_map, mask)
        assert cost.flops(mask) == count_flops(narrow, inputs) < cost.dense_flops
        assert cost.parameters(mask) == count_parameters(narrow)


def test_outputs_of_a_layer_are_counted_each_time_that_it_runs() -> None:
    for model in (shared(), tied()):
        cost = CostModel(model, channel_map := discover(model, IMAGE), IMAGE)
        assert cost.outputs(channel_map.full_mask()) == 64 * 64 * (8 + 8 + 8 + 5)


def test_the_outputs_of_a_weight_go_with_the_dimension_that_makes_them() -> None:
    model = BY_WEIGHT["a sum of products"]()  # of a weight that has its inputs first
    channel_map = discover(model, IMAGE)
    mask = torch.tensor([True] * 3 + [False] * 5 + [True] * 6 + [False] * 2)
    first, last = (narrow_module(model, channel_map, mask).get_submodule(n) for n in ("first", "last"))
    assert first.weight.shape[0] + last.weight.shape[1] == 9
    assert CostModel(model, channel_map, IMAGE).outputs(mask) == 64 * 64 * (9 + 5)


class Looking(TorchEncoder):
    """Looks at values, which those on the meta device do not have."""

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        assert int(tokens.max()) < WORDS
        return super().forward(tokens, padding)


def test_flops_are_those_of_attention_that_is_not_fused() -> None:
    tokens = (torch.zeros(2, 7, dtype=torch.int64),)
    assert count_flops(Looking(), tokens) == count_flops(TorchEncoder(), tokens)


class Numbers(nn.Linear):
    """Looks at numbers of NumPy, too."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.detach().numpy().shape == x.shape
        return super().forward(x)


def test_what_discovery_takes_is_counted_too() -> None:
    model, inputs = nn.Sequential(Numbers(4, 8), nn.Linear(8, 2)), (torch.zeros(3, 4),)
    cost = CostModel(model, discover(model, inputs), inputs)
    assert cost.dense_flops == 2 * 3 * (4 * 8 + 8 * 2)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = SmallNet().train()
    count_flops(model, (torch.zeros(1, 2, 8, 8),))
    assert model.training
    assert not any(p.is_meta for p in model.parameters())


class _ChannelProduct(nn.Module):
    """Spends FLOPs on a product of activations, which no weight accounts for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + (y.detach().flatten(2) @ y.detach().flatten(2).transpose(1, 2)).mean()


def test_flops_outside_the_layers_that_depend_on_the_mask_are_refused() -> None:
    model = _ChannelProduct()
    by_hand = MapBuilder(model)
    by_hand.width(("a",), "b")
    with pytest.raises(ValueError, match=r"the network in a _ChannelProduct .* a channel map of your own"):
        CostModel(model, by_hand.build(), IMAGE)


def test_one_backward_and_two_forwards_per_step_save_as_the_paper_says() -> None:
    dense, sub = 1000.0, 87.0
    for passes in ([(sub, 2, 1)], [(sub, 1, 1), (sub, 1, 0)]):
        assert train_cost_saving(dense, passes * 50, 50) == pytest.approx(3 / (4 * sub / dense))


def test_dense_training_saves_nothing_and_two_backwards_cost_six() -> None:
    assert train_cost_saving(10.0, [(10.0, 1, 1)] * 7, 7) == pytest.approx(1.0)
    assert train_cost_saving(10.0, [(2.0, 2, 2)] * 7, 7) == pytest.approx(3 * 10 / (6 * 2))


def test_a_saving_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no training step"):
        train_cost_saving(10.0, [], 0)


def test_a_map_without_atoms_costs_what_the_network_costs() -> None:
    """The dense control has nothing to drop; its cost model has no axes at all."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    channel_map = ChannelMap((), shapes, {name: (None,) * len(shape) for name, shape in shapes.items()})
    inputs = (torch.empty(1, 1, 8, 8),)
    cost = CostModel(model, channel_map, inputs)
    assert cost.flops(channel_map.full_mask()) == count_flops(model, inputs)
    assert cost.parameters(channel_map.full_mask()) == sum(p.numel() for p in model.parameters())


class Layer(nn.Module):
    """Attention over itself, then over a longer memory, in one forward; both tell heads by their tensors."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.own, self.cross = (nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attend(self.own, y, y)
        return x + self.attend(self.cross, self.norms[1](x), memory)

    def attend(self, layers: Any, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(layers[:3], (x, y, y), strict=True)
        q, k, v = (layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, t in pairs)
        return layers[3](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer(heads) for _ in range(2)), nn.Linear(16, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return self.head(x)


def test_products_of_attentions_with_as_many_heads_are_told_apart() -> None:
    """Of few heads, attentions often keep the same share; each product still goes with its own."""
    model, inputs = Decoder(heads=2).to("meta"), (torch.zeros(2, 6, 16), torch.zeros(2, 20, 16))
    channel_map = discover(model, inputs)
    cost = CostModel(model, channel_map, inputs)
    for group in channel_map.groups:
        mask = channel_map.full_mask()
        mask[group.start] = False
        assert cost.flops(mask) == count_flops(narrow_module(model, channel_map, mask), inputs)
