"""Maps by hand: transformers, language models, and a user's own network in a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.attention import HeadAttention, fit_attention
from offload_sparse.channels.check import check
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.specs import MapBuilder
from tests.support.decoder import decoder_map, small_decoder

IMAGES = (torch.zeros(2, 3, 32, 32),)
TOKENS = (torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0)),)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=5)


def timm_vit(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Callable[[], nn.Module]:
    settings: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
    return lambda: timm.create_model(name, **(settings | arguments))


VITS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision_vit,
    "timm": timm_vit(),
    "layer scale": timm_vit(init_values=0.1),
    "norm of queries and keys": timm_vit(qk_norm=True),
    "distilled": timm_vit("deit_tiny_distilled_patch16_224"),
}


@pytest.mark.parametrize("kind", VITS)
def test_vision_transformers_drop_mlp_channels_and_whole_heads(kind: str) -> None:
    model = VITS[kind]()
    found = discover(model, IMAGES)
    assert len(found.groups) == 4, "two layers, each with heads and an MLP"
    assert {group.size for group in found.groups} == {4, 48 if kind == "torchvision" else 128}
    assert check(model, IMAGES, found, rho=0.5).error < 1e-10
    for name, axes in found.axes.items():
        if any(part in name for part in ("token", "pos_embed", "norm", "ln", "ls1", "conv_proj", "head")):
            assert all(axis is None for axis in axes), f"{name} belongs to the embedding, which is dense"


def test_blocks_of_a_transformer_merge_mlp_channels_and_leave_heads() -> None:
    model = torchvision_vit()
    found = block_atoms(discover(model, IMAGES), 8)
    assert sorted(group.size for group in found.groups) == [4, 4, 6, 6]
    check(model, IMAGES, found)


def test_attention_keeps_its_meaning_with_all_heads() -> None:
    torch.manual_seed(0)
    full = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    own = copy.deepcopy(full)
    own.__class__ = HeadAttention
    fit_attention(own)
    x, hidden = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(5, 5).triu(1).bool()
    added = torch.zeros(5, 5, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    for mask in (None, hidden, added, torch.randn(2 * 3, 5, 5, dtype=torch.float64)):
        expected, _ = full(x, x, x, need_weights=False, attn_mask=mask)
        assert torch.allclose(own(x, x, x, need_weights=False, attn_mask=mask)[0], expected, atol=1e-12)
        for average in (True, False):
            asked = {"attn_mask": mask, "average_attn_weights": average}
            for found, right in zip(own(x, x, x, **asked), full(x, x, x, **asked), strict=True):
                assert torch.allclose(found, right, atol=1e-12)


def test_a_language_model_drops_gated_widths_and_grouped_heads() -> None:
    model = small_decoder()
    found = decoder_map(model)
    assert [(g.name, g.size) for g in found.groups[:2]] == [
        ("blocks.0.gate", 20),
        ("blocks.0.attention.k", 4),
    ]
    assert check(model, TOKENS, found).error < 1e-10
    assert check(model, TOKENS, block_atoms(found, 8)).error < 1e-10
    for leaf in ("q.weight", "q.bias"):
        axis = found.axes[f"blocks.0.attention.{leaf}"][0]
        assert axis is not None
        assert axis.tolist() == (20 + torch.arange(4)).repeat_interleave(12).tolist(), "two queries per key"


def test_a_query_head_on_the_wrong_key_head_is_refused() -> None:
    model = small_decoder(layers=1)
    found = decoder_map(model)
    axis = found.axes["blocks.0.attention.q.weight"][0]
    assert axis is not None
    wrong = axis.roll(6)
    for name in ("q.weight", "q.bias"):
        row = found.axes[f"blocks.0.attention.{name}"]
        found.axes[f"blocks.0.attention.{name}"] = (wrong, *row[1:])  # type: ignore[index]
    with pytest.raises(ValueError, match="slice differs from mask"):
        check(model, TOKENS, found)


class Own(nn.Module):
    """A network that discovery refuses: it does not know the transform."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.rfft2(self.norm(self.stem(x)).relu()).abs().mean((2, 3)))


def own_map(model: nn.Module) -> Any:
    builder = MapBuilder(model)
    channels = builder.group("stem", 8)
    builder.rows("stem", channels)
    builder.rows("norm", channels)
    builder.columns("head", channels)
    return builder.build()


def test_a_user_maps_a_network_of_his_own_in_a_few_lines() -> None:
    model = Own()
    with pytest.raises(ValueError, match="write a channel map by hand"):
        discover(model, IMAGES)
    check(model, IMAGES, own_map(model))


def test_the_outputs_of_a_transposed_layer_are_its_second_dimension() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 5, 1))
    builder = MapBuilder(net)
    builder.width(("0",), "1")
    builder.width(("1",), "2")
    assert builder.build().to_json() == discover(net, IMAGES).to_json()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda b: b.rows("stam", b.group("stem", 8)), "no tensor 'stam.weight'"),
        (lambda b: b.columns("norm", b.group("stem", 8)), "norm.weight has no dimension 1"),
        (lambda b: b.rows("stem", b.group("stem", 7)), r"axis 0 of stem.weight must be int64\[8\]"),
        (lambda b: b.heads("stem", "stem", "stem", "head", 3), "no heads of 3"),
        (lambda b: b.width(("nothing",), "head"), "no tensor 'nothing.weight'"),
        (lambda b: None, "has no group"),
    ],
)
def test_mistakes_in_a_map_name_what_is_wrong(mistake: Any, message: str) -> None:
    builder = MapBuilder(Own())

    def write() -> None:
        mistake(builder)
        builder.build()

    with pytest.raises(ValueError, match=message):
        write()
