"""``discover`` finds what goes with each channel, and refuses by name what it cannot follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import check
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.propagation import connected_components
from offload_sparse.channels.subnet import narrow_module
from tests.support.channel_maps import Net

IMAGES = (torch.zeros(2, 3, 16, 16),)
Conv = nn.Conv2d


def gated(net: Any, x: Tensor) -> Tensor:
    value, gate = net.a(x).chunk(2, dim=1)
    return net.b(value * torch.sigmoid(gate))


def shuffled(net: Any, x: Tensor) -> Tensor:
    b, c, h, w = net.a(x).shape
    return net.b(net.a(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


def global_response_norm(net: Any, x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(net.a(x), dim=(2, 3), keepdim=True)
    return net.c(net.b(net.a(x) * size / (size.mean(1, keepdim=True) + 1e-6)).relu())


def residual_block() -> Net:
    return Net(
        lambda n, x: n.head((n.stem(x) + n.b(n.bn(n.a(n.stem(x))).relu())).relu()),
        stem=Conv(3, 8, 3),
        a=Conv(8, 6, 3, padding=1),
        bn=nn.BatchNorm2d(6),
        b=Conv(6, 8, 1),
        head=Conv(8, 5, 1),
    )


def axis(channel_map: ChannelMap, tensor: str, dim: int = 0) -> list[int] | None:
    found = channel_map.axes[tensor][dim]
    return None if found is None else found.tolist()


def group_sizes(channel_map: ChannelMap) -> dict[str, int]:
    return {group.name: group.size for group in channel_map.groups}


class Cropping(nn.Module):
    """Cuts odd images by one column; behind that, the code counts channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 16, 1), Conv(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = x[..., :-1]
        h = self.a(x).relu()
        return self.b(torch.cat([h[:, 8:], h[:, :8]], 1))


@pytest.mark.parametrize("sizes", [(16, 17), (17, 16)])
def test_sizes_of_a_branch_that_the_example_did_not_take_are_refused(
    sizes: tuple[int, int],
) -> None:
    net, (known, other) = Cropping(), (torch.randn(2, 3, 16, size) for size in sizes)
    found = discover(net, (known,))
    assert check(net, (known,), found).error < 1e-10
    narrow = narrow_module(net, found, torch.arange(16) % 3 > 0)
    assert narrow(known).shape == net(known).shape
    with pytest.raises(ValueError, match="a Cropping takes a branch that the example inputs did not"):
        narrow(other)


def test_a_single_channel_is_still_a_dimension_when_others_are_squeezed() -> None:
    pooled = Net(lambda n, x: n.a(x).relu().mean((2, 3), keepdim=True).squeeze(), a=Conv(3, 8, 1))
    net = Net(lambda n, x: n.b(n.pooled(x)), pooled=pooled, b=nn.Linear(8, 5))
    found = discover(net, IMAGES)
    mask = torch.arange(8) == 3
    narrow = narrow_module(net, found, mask)
    for images in (torch.randn(4, 3, 5, 5), torch.randn(1, 3, 5, 5)):  # a batch of one is squeezed as ever
        hidden = functional.conv2d(images, pooled.a.weight[mask], pooled.a.bias[mask]).relu()
        expected = functional.linear(hidden.mean((2, 3)).squeeze(0), net.b.weight[:, mask], net.b.bias)
        torch.testing.assert_close(narrow(images), expected)


def test_connected_components_are_those_of_a_search() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randint(60, (2, 45), generator=generator)
    expected = list(range(60))
    for _ in range(60):
        for a, b in zip(u.tolist(), v.tolist(), strict=True):
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert connected_components(60, u, v).tolist() == expected


def test_a_norm_and_the_columns_of_the_consumer_go_with_a_filter() -> None:
    found = discover(
        Net(lambda n, x: n.b(n.bn(n.a(x))), a=Conv(3, 4, 3), bn=nn.BatchNorm2d(4), b=Conv(4, 5, 3)), IMAGES
    )
    assert group_sizes(found) == {"a": 4}
    for tensor in ("a.weight", "a.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        assert axis(found, tensor) == [0, 1, 2, 3]
    assert axis(found, "b.weight", 1) == [0, 1, 2, 3]
    assert axis(found, "a.weight", 1) is None, "the input of the network is never dropped"
    for tensor in ("b.weight", "b.bias"):
        assert axis(found, tensor) is None, "nor is its output"
    assert "bn.num_batches_tracked" not in found.shapes


def test_flatten_puts_one_atom_at_several_columns() -> None:
    found = discover(Net(lambda n, x: n.b(n.a(x).flatten(1)), a=Conv(3, 2, 13), b=nn.Linear(32, 5)), IMAGES)
    assert axis(found, "b.weight", 1) == [0] * 16 + [1] * 16


def test_concat_puts_several_groups_in_one_axis_and_inputs_stay() -> None:
    net = Net(
        lambda n, x: n.b(torch.cat([n.c(x), x, n.a(x)], 1)), a=Conv(3, 2, 1), c=Conv(3, 3, 1), b=Conv(8, 5, 1)
    )
    found = discover(net, IMAGES)
    assert group_sizes(found) == {"a": 2, "c": 3}
    assert axis(found, "b.weight", 1) == [2, 3, 4, -1, -1, -1, 0, 1]


def test_depthwise_convolutions_follow_their_input() -> None:
    found = discover(
        Net(lambda n, x: n.b(n.d(n.a(x))), a=Conv(3, 4, 1), d=Conv(4, 4, 3, groups=4), b=Conv(4, 5, 1)),
        IMAGES,
    )
    assert group_sizes(found) == {"a": 4}
    assert axis(found, "d.weight") == axis(found, "d.bias") == [0, 1, 2, 3]
    assert axis(found, "d.weight", 1) is None


def test_a_group_of_a_grouped_convolution_is_one_atom() -> None:
    found = discover(
        Net(lambda n, x: n.b(n.g(n.a(x))), a=Conv(3, 6, 1), g=Conv(6, 9, 3, groups=3), b=Conv(9, 5, 1)),
        IMAGES,
    )
    assert group_sizes(found) == {"a": 3}
    assert axis(found, "a.weight") == [0, 0, 1, 1, 2, 2]
    assert axis(found, "g.weight") == axis(found, "g.bias") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert axis(found, "g.weight", 1) is None, "columns are those within a group"
    assert axis(found, "b.weight", 1) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_group_of_a_group_norm_is_one_atom() -> None:
    net = Net(
        lambda n, x: n.b(n.norm(torch.cat([n.a(x), n.c(x)], 1)).relu()),
        a=Conv(3, 12, 1),
        c=Conv(3, 6, 1),
        norm=nn.GroupNorm(6, 18),
        b=Conv(18, 5, 1),
    )
    found = discover(net, IMAGES)
    assert group_sizes(found) == {"a": 4, "c": 2}
    assert axis(found, "norm.weight") == axis(found, "norm.bias") == [i // 3 for i in range(18)]
    kept = torch.tensor([True, False, True, False, False, True])
    narrow: Any = narrow_module(narrow_module(net, found, found.full_mask()), found, kept)
    hidden = torch.cat([net.a(IMAGES[0] + 1), net.c(IMAGES[0] + 1)], 1)
    normed = functional.group_norm(hidden, 6, net.norm.weight, net.norm.bias)
    rows = kept.repeat_interleave(3)
    expected = functional.conv2d(normed[:, rows].relu(), net.b.weight[:, rows], net.b.bias)
    torch.testing.assert_close(narrow(IMAGES[0] + 1), expected)
    assert (narrow.norm.num_groups, narrow.norm.num_channels) == (3, 9)


@pytest.mark.parametrize(
    ("hidden", "read"),
    [
        (lambda n, x: n.batch(n.a(x)), [0, 1, 2, 3, 4, 5, 6, 7]),
        (lambda n, x: n.group(n.a(x)), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda n, x: torch.cat([n.a(x)[:, :5], x], 1), [0, 1, 2, 3, 4, -1, -1, -1]),
        (
            lambda n, x: torch.stack([n.a(x)[:, :4], x[:, [0] * 4]], 2).flatten(1, 2),
            [0, -1, 1, -1, 2, -1, 3, -1],
        ),
        (lambda n, x: torch.stack([n.a(x), n.a(x)], -3).sum(-3), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=["batch norm", "group norm", "cat", "stack", "sum"],
)
def test_channels_are_known_without_their_pixels(
    hidden: Callable[[Any, Tensor], Tensor], read: list[int]
) -> None:
    """Of such images no memory has room for a number per pixel."""
    layers = {"a": Conv(3, 8, 1), "batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(4, 8)}
    net = Net(lambda n, x: n.b(hidden(n, x)), **layers, b=Conv(8, 2, 1))
    huge = torch.empty(1, 3, 1 << 22, 1 << 22, device="meta")
    for images in (*IMAGES, huge):
        assert axis(discover(net, (images,)), "b.weight", 1) == read


def test_overlapping_groups_of_two_convolutions_are_one_atom() -> None:
    net = nn.Sequential(Conv(3, 12, 1), Conv(12, 12, 1, groups=4), Conv(12, 12, 1, groups=6), Conv(12, 2, 1))
    assert axis(discover(net, IMAGES), "3.weight", 1) == [0] * 6 + [1] * 6


def test_a_gate_ties_the_two_halves_of_its_producer() -> None:
    found = discover(Net(gated, a=Conv(3, 8, 3), b=Conv(4, 5, 3)), IMAGES)
    assert axis(found, "a.weight") == [0, 1, 2, 3, 0, 1, 2, 3]


def test_coupled_streams_are_one_group_and_internal_ones_stay_dense() -> None:
    assert group_sizes(discover(residual_block(), IMAGES)) == {"stem": 8, "a": 6}
    internal = discover(residual_block(), IMAGES, residual="internal")
    assert group_sizes(internal) == {"a": 6}
    assert axis(internal, "stem.weight") is None
    assert axis(internal, "b.weight") is None
    assert axis(internal, "b.weight", 1) == [0, 1, 2, 3, 4, 5]


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None


def test_what_a_data_class_gives_is_output_too() -> None:
    layers = {"a": Conv(3, 8, 1), "b": Conv(8, 6, 1), "c": Conv(6, 5, 1)}
    model = Net(lambda n, x: [Output(n.c(n.b(n.a(x))), n.a(x))], **layers)
    found = discover(model, IMAGES)
    assert group_sizes(found) == {"b": 6}
    check(model, IMAGES, found)
    with pytest.raises(ValueError, match="outputs have shapes"):
        check(model, IMAGES, discover(Net(lambda n, x: n.c(n.b(n.a(x))), **layers), IMAGES))


def test_a_squeeze_excite_gate_makes_no_stream() -> None:
    net = Net(
        lambda n, x: n.head(n.a(x) * torch.sigmoid(n.up(n.down(n.a(x).mean((2, 3), keepdim=True)).relu()))),
        a=Conv(3, 8, 1),
        down=Conv(8, 2, 1),
        up=Conv(2, 8, 1),
        head=Conv(8, 5, 1),
    )
    found = discover(net, IMAGES, residual="internal")
    assert group_sizes(found) == {"a": 8, "down": 2}
    assert axis(found, "up.weight") == axis(found, "a.weight")


def test_every_parameter_and_floating_buffer_is_listed_once() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    found = discover(model, (torch.zeros(1, 3, 64, 64),), residual="internal")
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    assert dict(found.shapes) == {name: tuple(t.shape) for name, t in tensors if t.is_floating_point()}


def test_the_model_is_left_as_it_was() -> None:
    model = residual_block().train()
    model.bn.eval()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = torch.ones_like(model.b.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        found = discover(model, IMAGES)
    assert group_sizes(found) == {"stem": 8, "a": 6}, "frozen parameters are followed too"
    assert model.training
    assert model.a.training
    assert not model.bn.training
    assert not model.a.weight.requires_grad
    assert bool((model.b.weight.grad == 1).all())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.bn._forward_hooks
    assert not torch.is_inference_mode_enabled()


def test_a_model_that_looks_at_values_is_traced_on_the_cpu() -> None:
    net = Net(
        lambda n, x: n.b(n.a(x) * (2.0 if x.sum().item() > 1 else 1.0)), a=Conv(3, 4, 1), b=Conv(4, 5, 1)
    )
    assert group_sizes(discover(net, IMAGES)) == {"a": 4}
    assert group_sizes(discover(net.to("meta"), IMAGES)) == {"a": 4}
    with pytest.raises(ValueError, match="Net cannot be traced"):
        discover(net, (torch.zeros(2, 4, 16, 16),))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "group norm of all channels": (
        Net(lambda n, x: n.b(n.norm(n.a(x))), a=Conv(3, 4, 1), b=Conv(4, 5, 1), norm=nn.GroupNorm(1, 4)),
        "a meets a group norm in norm; .*MapBuilder",
    ),
    "group norm without scale": (
        Net(
            lambda n, x: n.b(n.norm(n.a(x))),
            a=Conv(3, 4, 1),
            b=Conv(4, 5, 1),
            norm=nn.GroupNorm(2, 4, affine=False),
        ),
        "a meets a group norm in norm; .*MapBuilder",
    ),
    "group norm of a function": (
        Net(
            lambda n, x: n.b(functional.group_norm(n.a(x), 2, n.w)),
            a=Conv(3, 4, 1),
            b=Conv(4, 5, 1),
            w=nn.Parameter(torch.ones(4)),
        ),
        "a meets a group norm in the network; .*MapBuilder",
    ),
    "layer norm": (
        Net(
            lambda n, x: n.b(n.norm(n.a(x.flatten(1)))),
            a=nn.Linear(768, 4),
            b=nn.Linear(4, 5),
            norm=nn.LayerNorm(4),
        ),
        "a meets a layer norm in norm",
    ),
    "spectral norm": (
        Net(
            lambda n, x: n.b(n.a(x)),
            a=nn.utils.parametrizations.spectral_norm(Conv(3, 4, 1)),
            b=Conv(4, 5, 1),
        ),
        "a meets ",
    ),
    "unknown operation": (
        Net(lambda n, x: n.b(n.a(x).sort(1).values), a=Conv(3, 4, 1), b=Conv(4, 5, 1)),
        "a meets sort in the network",
    ),
    "nothing to drop": (Net(lambda n, x: n.a(x), a=Conv(3, 4, 1)), "no channel of Net can be dropped"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_narrowed_is_refused_by_name(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        discover(model, IMAGES)
    assert "\n" not in str(refusal.value)


def test_layers_that_share_a_parameter_keep_the_same_channels() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=Conv(3, 4, 1), b=Conv(4, 4, 1), c=Conv(4, 4, 1))
    net.c.weight, net.head = net.b.weight, Conv(4, 5, 1)
    net.run = lambda n, x: n.head(n.c(n.b(n.a(x)).relu()))
    found = discover(net, IMAGES)
    assert group_sizes(found) == {"a": 4}
    assert axis(found, "b.weight") == axis(found, "b.weight", 1) == axis(found, "head.weight", 1)
    check(net, IMAGES, found)


TRAPS: dict[str, nn.Module] = {
    "pixel shuffle": Net(
        lambda n, x: n.b(functional.pixel_shuffle(n.a(x), 2)), a=Conv(3, 16, 3), b=Conv(4, 5, 3)
    ),
    "pixel unshuffle": Net(
        lambda n, x: n.b(functional.pixel_unshuffle(n.a(x), 2)), a=Conv(3, 4, 3, padding=1), b=Conv(16, 5, 3)
    ),
    "ones around": Net(
        lambda n, x: n.b(functional.pad(n.a(x), (1, 1), value=1)), a=Conv(3, 8, 3), b=Conv(8, 5, 3)
    ),
    "channel shuffle": Net(shuffled, a=Conv(3, 16, 3), b=Conv(16, 5, 3)),
    "channel shuffle of four": Net(shuffled, a=Conv(3, 4, 3), b=Conv(4, 5, 3)),
    "every second channel": Net(lambda n, x: n.b(n.a(x)[:, ::2]), a=Conv(3, 8, 3), b=Conv(4, 5, 3)),
    "mean over channels": Net(
        lambda n, x: n.b(n.a(x) * n.a(x).mean(1, keepdim=True).sigmoid()), a=Conv(3, 8, 3), b=Conv(8, 5, 3)
    ),
    "response norm": Net(
        lambda n, x: n.b(functional.local_response_norm(n.a(x), 3)), a=Conv(3, 8, 3), b=Conv(8, 5, 3)
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_never_passes_both_discovery_and_self_test(trap: str) -> None:
    with pytest.raises(ValueError):
        check(TRAPS[trap], IMAGES, discover(TRAPS[trap], IMAGES))


LEAVING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sigmoid": lambda n, h: h.sigmoid(),
    "a constant": lambda n, h: h + torch.arange(6.0, dtype=h.dtype, device=h.device).view(6, 1, 1),
    "a channel for all": lambda n, h: h + n.one(h),
    "generalised mean": lambda n, h: h.clamp(min=1e-3).pow(3).mean((2, 3), keepdim=True).pow(1 / 3),
    "noise": lambda n, h: h + (h / 2).exp() * torch.randn_like(h),
}


@pytest.mark.parametrize("case", LEAVING)
def test_only_a_width_of_which_something_would_be_left_stays_dense(case: str) -> None:
    net = Net(
        lambda n, x: n.c(LEAVING[case](n, n.b(n.a(x).relu()))),
        a=Conv(3, 8, 1),
        b=Conv(8, 6, 1),
        one=Conv(6, 1, 1),
        c=Conv(6, 5, 1),
    )
    found = discover(net, IMAGES)
    assert group_sizes(found) == {"a": 8}
    check(net, IMAGES, found)


OWN_WEIGHTS: list[tuple[Any, ...]] = [
    ("convolution", functional.conv2d, 3, 3),
    ("linear layer", lambda x, w: functional.linear(x.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)),
    ("sum", lambda x, w: torch.einsum("bchw,oc->bohw", x, w)),
]


def swapped(*parts: Tensor) -> Tensor:
    return torch.cat(parts[::-1], 1)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a * b, a], 1)


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: swapped(*x.chunk(chunks=2, dim=1)),
    "split": lambda x: swapped(*torch.split(x, split_size_or_sections=(4, 8), dim=1)),
    "view": lambda x: multiplied(*x.view(size=(-1, 2, 6, 16, 16)).unbind(1)),
    "unflatten": lambda x: multiplied(*x.unflatten(dim=1, sizes=(2, 6)).unbind(1)),
    "narrow": lambda x: swapped(x.narrow(1, 0, 5), x.narrow(dim=1, start=5, length=4), x.narrow(1, -3, 3)),
    "tensor_split": lambda x: swapped(*x.tensor_split(5, dim=1)),
    "tensor_split at": lambda x: swapped(*torch.tensor_split(x, (3, -4), dim=-3)),
}


def right_maps() -> dict[str, nn.Module]:
    return {
        "gate": Net(gated, a=Conv(3, 16, 3), b=Conv(8, 5, 3)),
        "view after linear": Net(
            lambda n, x: n.b(n.a(x.flatten(1)).view(len(x), -1, 4, 4)), a=nn.Linear(768, 64), b=Conv(4, 5, 3)
        ),
        "transposed and skip": Net(
            lambda n, x: n.o(torch.cat([n.a(x), n.up(n.down(n.a(x)))], 1)),
            a=Conv(3, 8, 1),
            down=Conv(8, 6, 2, 2),
            up=nn.ConvTranspose2d(6, 7, 2, 2),
            o=Conv(15, 5, 1),
        ),
        "prelu per channel": Net(
            lambda n, x: n.b(n.p(n.a(x))), a=Conv(3, 8, 1), p=nn.PReLU(8), b=Conv(8, 5, 1)
        ),
        "norm without scale": Net(
            lambda n, x: n.b(n.p(n.a(x))), a=Conv(3, 8, 1), p=nn.BatchNorm2d(8, affine=False), b=Conv(8, 5, 1)
        ),
        "dictionary of outputs": Net(
            lambda n, x: {"y": n.b(n.a(x).relu())}, a=Conv(3, 8, 1), b=Conv(8, 5, 1)
        ),
        "grouped convolution": Net(
            lambda n, x: n.b(n.bn(n.g(n.a(x)))),
            a=Conv(3, 12, 1),
            g=Conv(12, 18, 3, groups=6),
            bn=nn.BatchNorm2d(18),
            b=Conv(18, 5, 1),
        ),
        "transposed grouped convolution": Net(
            lambda n, x: n.b(n.g(n.a(x))),
            a=Conv(3, 12, 1),
            g=nn.ConvTranspose2d(12, 18, 2, groups=6),
            b=Conv(18, 5, 1),
        ),
        "depthwise convolution that widens": Net(
            lambda n, x: n.b(n.g(n.a(x))),
            a=Conv(3, 6, 1),
            g=Conv(6, 12, 3, groups=6),
            b=Conv(12, 5, 1),
        ),
        "group norms that do not fit each other": Net(
            lambda n, x: n.b(n.q(n.p(n.a(x)))),
            a=Conv(3, 24, 1),
            p=nn.GroupNorm(12, 24),
            q=nn.GroupNorm(8, 24),
            b=Conv(24, 5, 1),
        ),
        "layer used twice": Net(
            lambda n, x: n.b(n.a(n.a(n.i(x)).relu())), i=Conv(3, 8, 1), a=Conv(8, 8, 1), b=Conv(8, 5, 1)
        ),
        "fixed view after linear": Net(
            lambda n, x: n.b(n.a(x.flatten(1)).view(-1, 4, 4, 4)), a=nn.Linear(768, 64), b=Conv(4, 5, 3)
        ),
        "flipped channels": Net(lambda n, x: n.b(n.a(x).flip(1)), a=Conv(3, 8, 1), b=Conv(8, 5, 1)),
        "scale of its own": Net(
            lambda n, x: n.b(n.a(x) * n.scale + n.shift),
            a=Conv(3, 8, 1),
            b=Conv(8, 5, 1),
            scale=nn.Parameter(torch.ones(8, 1, 1)),
            shift=nn.Parameter(torch.ones(8, 1, 1)),
        ),
        "positions of its own": Net(
            lambda n, x: n.b(n.a(x) + n.p),
            a=Conv(3, 8, 1),
            b=Conv(8, 5, 1),
            p=nn.Parameter(torch.ones(1, 8, 16, 16)),
        ),
        **{
            f"weight of its own in a {kind}": Net(
                lambda n, x, apply=apply: n.b(apply(n.a(x), n.w).relu()),
                a=Conv(3, 8, 1),
                b=Conv(6, 5, 1),
                w=nn.Parameter(torch.ones(6, 8, *window)),
            )
            for kind, apply, *window in OWN_WEIGHTS
        },
        **{
            f"instance norm, affine {affine}, statistics {tracked}": Net(
                lambda n, x: n.b(n.norm(n.a(x))),
                a=Conv(3, 8, 1),
                b=Conv(8, 5, 1),
                norm=nn.InstanceNorm2d(8, affine=affine, track_running_stats=tracked),
            )
            for affine, tracked in ((True, False), (True, True), (False, True))
        },
        "spatial attention": Net(
            lambda n, x: n.b(n.a(x) * n.m(n.a(x)).sigmoid()),
            a=Conv(3, 8, 1),
            m=Conv(8, 1, 1),
            b=Conv(8, 5, 1),
        ),
        "sliced gate": Net(
            lambda n, x: n.b(n.a(x)[:, :8] * n.a(x)[:, 8:].tanh()), a=Conv(3, 16, 3), b=Conv(8, 5, 3)
        ),
        "channels-last flatten": Net(
            lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=Conv(3, 8, 1), b=nn.Linear(8 * 256, 5)
        ),
        "detached branch": Net(
            lambda n, x: n.b(n.a(x)) + n.c(n.a(x).detach()), a=Conv(3, 8, 3), b=Conv(8, 5, 3), c=Conv(8, 5, 3)
        ),
        "swapped halves": Net(
            lambda n, x: n.b(torch.cat(n.a(x).split([3, 5], 1)[::-1], 1)), a=Conv(3, 8, 3), b=Conv(8, 5, 3)
        ),
        "padded shortcut": Net(
            lambda n, x: n.o(n.b(n.a(x)) + functional.pad(n.a(x), (0, 0, 0, 0, 4, 4))),
            a=Conv(3, 8, 1),
            b=Conv(8, 16, 1),
            o=Conv(16, 5, 1),
        ),
        "gated by a function": Net(
            lambda n, x: n.b(functional.glu(n.a(x), 1)), a=Conv(3, 16, 3), b=Conv(8, 5, 3)
        ),
        "beside new zeros": Net(
            lambda n, x: n.b(torch.cat([n.a(x), n.a(x).new_zeros(len(x), 2, 16, 16)], 1)),
            a=Conv(3, 8, 1),
            b=Conv(10, 5, 1),
        ),
        "gated by what is left": Net(
            lambda n, x: n.b(n.a(x) * n.a(x).exp() + n.a(x).cos() - 1), a=Conv(3, 8, 1), b=Conv(8, 5, 1)
        ),
        "norm of what is left": Net(
            lambda n, x: n.b(n.m(n.a(x).sigmoid())), a=Conv(3, 8, 1), m=nn.BatchNorm2d(8), b=Conv(8, 5, 1)
        ),
        "zeros around": Net(
            lambda n, x: n.b(functional.pad(n.a(x), (1, 2, 0, 1))), a=Conv(3, 8, 1), b=Conv(8, 5, 3)
        ),
        "maximum of what is around": Net(
            lambda n, x: n.b(n.pool(functional.pad(n.a(x), (0, 1, 0, 1), value=-torch.inf))),
            a=Conv(3, 8, 1),
            pool=nn.MaxPool2d(2, 1),
            b=Conv(8, 5, 1),
        ),
        **{
            f"upsampled by {mode}": Net(
                lambda n, x, m=mode: n.b(n.a(x) + functional.interpolate(n.c(n.a(x)), x.shape[2:], mode=m)),
                a=Conv(3, 8, 1),
                c=Conv(8, 8, 3, stride=2, padding=1),
                b=Conv(8, 5, 1),
            )
            for mode in ("nearest", "bilinear", "bicubic")
        },
        "norm over places": Net(
            lambda n, x: n.b(n.a(x) * n.a(x).norm(dim=(2, 3), keepdim=True)), a=Conv(3, 8, 1), b=Conv(8, 5, 1)
        ),
        "normalised over places": Net(
            lambda n, x: n.b(functional.normalize(n.a(x).flatten(2), dim=2).sum(2)),
            a=Conv(3, 8, 1),
            b=nn.Linear(8, 5),
        ),
        "global response norm": Net(global_response_norm, a=Conv(3, 8, 1), b=Conv(8, 6, 1), c=Conv(6, 5, 1)),
        **{
            f"written as {name}": Net(
                lambda n, x, run=run: n.b(run(n.a(x))), a=Conv(3, 12, 1), b=Conv(12, 5, 1)
            )
            for name, run in WRITTEN.items()
        },
        "called by a keyword": Net(
            lambda n, x: n.b(input=n.a(input=x).flatten(1)), a=Conv(3, 8, 1), b=nn.Linear(8 * 256, 5)
        ),
        "flattened by a keyword": Net(
            lambda n, x: n.b(torch.reshape(n.a(x), shape=(-1, 8 * 256))),
            a=Conv(3, 8, 1),
            b=nn.Linear(8 * 256, 5),
        ),
        "repeated channels": Net(
            lambda n, x: n.b(n.a(x).repeat_interleave(2, 1)), a=Conv(3, 4, 3), b=Conv(8, 5, 3)
        ),
    }


@pytest.mark.parametrize("case", right_maps())
def test_odd_but_right_networks_pass_both(case: str) -> None:
    model = right_maps()[case]
    found = discover(model, IMAGES)
    assert found.num_atoms >= 4
    check(model, IMAGES, found)
