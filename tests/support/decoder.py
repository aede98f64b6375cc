"""A small decoder-only language model: RMS norm, grouped queries, rotary positions, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.specs import MapBuilder


class GroupedQueryAttention(nn.Module):
    """Query heads share key-value heads; the number of heads follows from the tensors."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, self.share = head_dim, heads // kv_heads
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, kv_heads * head_dim)
        self.v = nn.Linear(width, kv_heads * head_dim)
        self.o = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (_rotate(k).repeat_interleave(self.share, 1), v.repeat_interleave(self.share, 1))
        y = functional.scaled_dot_product_attention(_rotate(q), k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedQueryAttention(width, heads=8, kv_heads=4, head_dim=6)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Maps int64[N, L] to float[N, L, words]."""

    def __init__(self, words: int = 11, width: int = 16, hidden: int = 20, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def decoder_map(model: nn.Module) -> ChannelMap:
    """Widths of the gated units, and key-value heads with the query heads that read them."""
    builder = MapBuilder(model)
    for name, module in model.named_modules():
        if isinstance(module, Block):
            builder.width((f"{name}.gate", f"{name}.up"), f"{name}.down")
            names = [f"{name}.attention.{layer}" for layer in "qkvo"]
            builder.heads(names[0], names[1], names[2], names[3], module.attention.head_dim)
    return builder.build()
