"""Transformers lose whole heads and hidden channels, whoever wrote them; their stream stays dense."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.check import check, random_mask, self_test
from offload_sparse.channels.discovery import discover, policies
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import Subnet, narrow_module
from offload_sparse.inspect.coverage import CASES, build
from tests.support.decoder import decoder_map, small_decoder
from tests.support.language_models import (
    WORDS,
    AlibiAttention,
    CosineAttention,
    EinsumAttention,
    FusedAttention,
    GatedUnit,
    LanguageModel,
    MultiQueryAttention,
    ParallelAttention,
    SeparateAttention,
    SlicedAttention,
    TorchEncoder,
)

TOKENS = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])

OWN: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[int, int]]] = {
    "nanoGPT": (lambda: LanguageModel(lambda: FusedAttention(24, 6, True)), (TOKENS,), (6, 40)),
    "nanoGPT, slow": (lambda: LanguageModel(lambda: FusedAttention(24, 6, False)), (TOKENS,), (6, 40)),
    "separate": (lambda: LanguageModel(lambda: SeparateAttention(24, 4), tied=False), (TOKENS,), (4, 40)),
    "sliced, grouped queries": (lambda: LanguageModel(lambda: SlicedAttention(24, 6, 3)), (TOKENS,), (3, 40)),
    "einsum": (lambda: LanguageModel(lambda: EinsumAttention(24, 4)), (TOKENS,), (4, 40)),
    "fused gate": (
        lambda: LanguageModel(lambda: FusedAttention(24, 6, True), lambda: GatedUnit(24, 20)),
        (TOKENS,),
        (6, 20),
    ),
    "all in one layer": (
        lambda: LanguageModel(lambda: ParallelAttention(24, 4, 40), nn.Identity),
        (TOKENS,),
        (4, 40),
    ),
    "slopes": (lambda: LanguageModel(lambda: AlibiAttention(24, 4)), (TOKENS,), (4, 40)),
    "cosine": (lambda: LanguageModel(lambda: CosineAttention(24, 4)), (TOKENS,), (4, 40)),
    "one key-value head": (
        lambda: LanguageModel(lambda: MultiQueryAttention(24, 6, False)),
        (TOKENS,),
        (6, 40),
    ),
    "copies of one": (lambda: LanguageModel(lambda: MultiQueryAttention(24, 6, True)), (TOKENS,), (6, 40)),
    "torch": (TorchEncoder, (TOKENS, PADDING), (6, 40)),
    "torch, length first": (lambda: TorchEncoder(False), (TOKENS,), (6, 40)),
    "torch, norm first": (lambda: TorchEncoder(norm_first=True), (TOKENS,), (6, 40)),
}


@pytest.mark.parametrize("kind", OWN)
def test_heads_and_hidden_channels_are_found_and_exact(kind: str) -> None:
    build, inputs, sizes = OWN[kind]
    torch.manual_seed(0)
    model = build()
    found = discover(model, inputs)
    assert [group.size for group in found.groups] == list(sizes) * 2
    assert self_test(model, inputs, found).error < 1e-10
    assert check(model, inputs, block_atoms(found, 8)).error < 1e-10
    for name, axes in found.axes.items():
        if any(part in name for part in ("wte", "wpe", "embedding", "norm", "n1", "n2", "head")):
            assert all(axis is None for axis in axes), f"{name} belongs to the stream, which is dense"


def test_the_stream_of_a_transformer_is_dense_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = LanguageModel(lambda: FusedAttention(24, 6, True))
    assert policies(model, (TOKENS,)) == ("internal",)
    with caplog.at_level(logging.WARNING):
        discover(model, (TOKENS,))
    assert "residual: internal for LanguageModel" in caplog.text


def test_grouped_queries_with_rotary_positions_are_the_map_by_hand() -> None:
    model = small_decoder()
    by_hand, found = decoder_map(model), discover(model, (torch.randint(11, (4, 7)),))
    for layer in ("q", "k", "v", "o"):
        hand = by_hand.axes[f"blocks.0.attention.{layer}.weight"][int(layer == "o")]
        own = found.axes[f"blocks.0.attention.{layer}.weight"][int(layer == "o")]
        assert hand is not None
        assert own is not None
        assert torch.equal(hand - hand.min(), own - own.min())


class WithWeights(nn.Module):
    """Calls torch's attention as it is mostly called: for its outputs, but with its weights. Keys and values
    may be narrower than queries."""

    def __init__(self, average: bool, keys: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=keys, vdim=keys, batch_first=True)
        self.norm, self.keys = nn.LayerNorm(16), keys
        self.up, self.down, self.average = nn.Linear(16, 24), nn.Linear(24, 16), average

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = y[..., : self.keys]
        x = x + self.attention(y, z, z, average_attn_weights=self.average)[0]
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("keys", [16, 12])
@pytest.mark.parametrize(("average", "sizes"), [(True, [24]), (False, [4, 24])])
def test_attention_that_also_gives_its_weights_is_narrowed(
    average: bool, sizes: list[int], keys: int
) -> None:
    """But for its heads where the weights are averaged over these."""
    model, inputs = WithWeights(average, keys), (torch.zeros(2, 5, 16),)
    found = discover(model, inputs)
    assert [group.size for group in found.groups] == sizes
    assert self_test(model, inputs, found).error < 1e-10


class OneForward(nn.Module):
    """Torch's attention, and behind it a width whose halves are cut by a number of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        first, last = self.up(self.norm(x)).relu().split(12, 2)
        return x + self.down(torch.cat([last, first], 2))


def test_widths_behind_an_attention_of_which_all_heads_are_kept() -> None:
    model, x = OneForward().eval(), torch.randn(2, 5, 16)
    found = discover(model, (x,))
    mask = found.full_mask()
    mask[4] = False  # behind the four heads: the first channel of the width
    narrow = narrow_module(model, found, mask)
    with torch.no_grad():
        model.up.weight[0], model.up.bias[0] = 0, 0
    torch.testing.assert_close(narrow(x), model(x))


def test_the_only_key_value_head_is_always_there() -> None:
    model = LanguageModel(lambda: MultiQueryAttention(24, 6, True))
    found = discover(model, (TOKENS,))
    assert all(axis is None for n in ("k", "v") for axis in found.axes[f"blocks.0.attn.{n}.weight"])
    assert [group.shared for group in found.groups] == [True, False] * 2


@pytest.mark.parametrize(
    "attention",
    [
        lambda: FusedAttention(24, 6, True),
        lambda: AlibiAttention(24, 6),
        lambda: MultiQueryAttention(24, 6, True),
    ],
    ids=["fused", "slopes", "one key-value head"],
)
def test_a_narrow_network_serves_other_batches_and_lengths(attention: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = LanguageModel(attention).eval()
    found = discover(model, (TOKENS,))
    mask = random_mask(found, 0.5, torch.Generator().manual_seed(0))
    narrow = narrow_module(model, found, mask)
    assert narrow.head.weight is narrow.wte.weight, "tied layers stay tied"
    again = pickle.loads(pickle.dumps(narrow))
    for shape in ((1, 3), (5, 16), (6, 6), (24, 12)):
        tokens = torch.randint(WORDS, shape)
        assert narrow(tokens).shape == (*shape, WORDS)
        assert torch.equal(again(tokens), narrow(tokens))


def test_one_skeleton_is_bound_to_one_selection_after_the_other() -> None:
    torch.manual_seed(0)
    model = LanguageModel(lambda: SlicedAttention(24, 6, 3)).eval()
    found = discover(model, (TOKENS,))
    subnet = Subnet(model, torch.device("cpu"))
    for seed in range(3):
        mask = random_mask(found, 0.5, torch.Generator().manual_seed(seed))
        selection, narrow = Selection(found, mask), narrow_module(model, found, mask)
        weights = torch.cat([dict(narrow.named_parameters())[n].flatten() for n in subnet.parameter_names])
        buffers = torch.cat([torch.zeros(0), *(b.flatten() for _, b in narrow.named_buffers())])
        subnet.bind(selection, weights.detach(), buffers)
        assert torch.equal(subnet.module.eval()(TOKENS), narrow.eval()(TOKENS))
        subnet.release()


class Sorted(nn.Module):
    """A hidden width that is sorted: nothing can be followed through it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sort(-1).values)


class SingleHead(nn.Module):
    """Attention without heads, whose scale depends on its width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.q(x) @ self.k(x).transpose(1, 2) / self.q(x).shape[-1] ** 0.5
        return weights.softmax(-1) @ self.v(x)


class OneHeadInChunks(nn.Module):
    """As the first stage of timm's MaxViT: one head, whose values alone can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(24, 3 * 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 1, 3 * 16).transpose(1, 2).chunk(3, dim=3)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.project(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_chunks_of_which_one_is_narrowed_are_no_longer_equal() -> None:
    model, inputs = OneHeadInChunks(), (torch.randn(2, 5, 24),)
    found = discover(model, inputs, "internal")
    assert [(group.name, group.size) for group in found.groups] == [("qkv", 16)]
    self_test(model, inputs, found)


def test_what_is_not_recognised_is_refused_with_the_layer_and_a_start() -> None:
    model = LanguageModel(nn.Identity, Sorted)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up meets sort in blocks\.0\.mlp") as refusal:
        discover(model, (TOKENS,))
    assert "builder = MapBuilder(model); builder.width(('blocks.0.mlp.up',)" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_followed_stays_dense_beside_what_can() -> None:
    model = LanguageModel(SingleHead)
    found = discover(model, (TOKENS,))
    assert [group.name for group in found.groups] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert self_test(model, (TOKENS,), found).error < 1e-10


PUBLISHED = {
    "Llama": [3, 80] * 2,
    "Qwen3": [3, 80] * 2,
    "Phi3": [3, 80] * 2,
    "GPT2LMHeadModel": [6, 192] * 2,
    "BertForSequenceClassification": [6, 80] * 2 + [48],
    "Bloom": [6, 192] * 2,
    "Falcon": [6, 80] * 2,
    "OPT": [6, 80] * 2,
    "ViT": [6, 80] * 2,
}
"""Sizes of the groups by the beginning of a name in the table of networks."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_families_of_transformers_lose_whole_heads(family: str) -> None:
    pytest.importorskip("transformers")
    (case,) = (case for case in CASES if case.name.startswith(f"transformers/{family}"))
    model, inputs = build(case), (torch.zeros(2, 3, 32, 32) if case.size else TOKENS,)
    found = discover(model, inputs)
    assert [group.size for group in found.groups] == PUBLISHED[family]
    assert self_test(model, inputs, found).error < 1e-10
