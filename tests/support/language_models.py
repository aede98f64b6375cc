"""Small language models in the ways in which people write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WORDS = 30


class FusedAttention(nn.Module):
    """nanoGPT's: one projection for queries, keys and values, split by a number of the code."""

    def __init__(self, width: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd, self.flash = heads, width, flash
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.dropout(functional.softmax(scores, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class SeparateAttention(nn.Module):
    """Three projections, and sizes that follow from the tensors at hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        batch, length = x.shape[:2]
        q = q.view(batch, length, self.heads, q.shape[-1] // self.heads).transpose(1, 2)
        k, v = (t.reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SlicedAttention(nn.Module):
    """One projection that is sliced, with fewer heads of keys and values than of queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.heads, self.kv_heads = width // heads, heads, kv_heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size)
        self.o = nn.Linear(heads * self.size, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        a, b = self.heads * self.size, (self.heads + self.kv_heads) * self.size
        q, k, v = y[..., :a], y[..., a:b], y[:, :, b:]
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class ParallelAttention(nn.Module):
    """All that reads the stream in one layer: heads, few, and a hidden width."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.inward, self.o = nn.Linear(width, 3 * width + hidden), nn.Linear(width, width)
        self.outward, self.heads, self.sizes = nn.Linear(hidden, width), heads, [*(width,) * 3, hidden]

    def forward(self, x: Tensor) -> Tensor:
        *parts, y = self.inward(x).split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(heads.transpose(1, 2).flatten(2)) + self.outward(functional.gelu(y))


class EinsumAttention(SeparateAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1) for p in (self.q, self.k, self.v))
        weights = torch.einsum("bthd,bshd->bhts", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return self.o(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


class CosineAttention(SeparateAttention):
    """Queries and keys of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = q / (q.norm(dim=-1, keepdim=True) + 1e-6), functional.normalize(k, dim=-1)
        return self.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class AlibiAttention(SeparateAttention):
    """Positions as a slope per head, made of a number of the code."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        slopes = 2.0 ** -torch.arange(1, self.heads + 1, device=x.device).to(x.dtype)
        places = torch.arange(x.shape[1], device=x.device)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores + slopes.view(-1, 1, 1) * (places[None] - places[:, None])
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MultiQueryAttention(nn.Module):
    """One head of keys and values for all queries, broadcast or copied."""

    def __init__(self, width: int, heads: int, copied: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // heads), nn.Linear(width, width // heads)
        self.heads, self.copied = heads, copied

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        if self.copied:
            k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class GatedUnit(nn.Module):
    """SwiGLU whose gate and value come from one layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * value)


class LanguageModel(nn.Module):
    """int64[N, L] to float[N, L, words] by pre-norm blocks; the head may be the embedding."""

    def __init__(self, attention: Any, unit: Any = None, width: int = 24, tied: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, width), nn.Embedding(16, width)
        unit = unit or (lambda: nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width)))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"n1": nn.LayerNorm(width), "attn": attention(), "n2": nn.LayerNorm(width), "mlp": unit()}
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = x + block["attn"](block["n1"](x))
            x = x + block["mlp"](block["n2"](x))
        return self.head(self.norm(x))


class TorchEncoder(nn.Module):
    """Torch's own encoder over tokens, with a padding mask."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 6, 40, batch_first=batch_first, norm_first=norm_first)
        self.embedding, self.head = nn.Embedding(WORDS, 24), nn.Linear(24, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.encoder(x, src_key_padding_mask=padding)
        return self.head((y if self.batch_first else y.transpose(0, 1)).mean(1))
