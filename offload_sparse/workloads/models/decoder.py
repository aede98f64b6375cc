"""A language model of today's shape: grouped queries, rotary positions, gated units, RMS norms.

    tokens ─ Embedding ─┬─────────────────── + ─┬───────────────────────────── + ─ … ─ RMS ─ Linear ─ logits
                        └ RMS ─ attention ───┘  └ RMS ─ SiLU(gate) · up ─ down ┘

``plan`` says of it what a decoder larger than memory takes; it is trained in a loop of one's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention; each head of keys and values serves ``heads // kv_heads`` heads of queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_size, self.share = width // heads, heads // kv_heads
        self.q = nn.Linear(width, heads * self.head_size, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_size, bias=False)
        self.o = nn.Linear(heads * self.head_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.share, 1) for t in (_rotated(k), v))
        y = F.scaled_dot_product_attention(_rotated(q), k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated unit, each added to the stream behind a norm."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Blocks of attention and gated units between an embedding and a head of its own.

    Args:
        num_classes: words of the vocabulary.
        width: channels of the residual stream.
        hidden: channels of a gated unit.
        layers: blocks.
        heads: heads of queries; they divide ``width``.
        kv_heads: heads of keys and values; they divide ``heads``.

    Shape: int64[N, L] → float[N, L, num_classes].
    """

    def __init__(
        self,
        num_classes: int = 256,
        width: int = 256,
        hidden: int = 704,
        layers: int = 4,
        heads: int = 8,
        kv_heads: int = 4,
    ) -> None:
        super().__init__()
        if width % heads or heads % kv_heads or (width // heads) % 2:
            raise ValueError(
                f"width {width}, heads {heads}, kv_heads {kv_heads}: each must divide the one before it, and "
                "a head have an even size"
            )
        self.embedding = nn.Embedding(num_classes, width)
        self.blocks = nn.Sequential(*(Block(width, hidden, heads, kv_heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, num_classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, RoFormer, eq. 34) on float[N, heads, L, size], in halves."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10_000 ** -(torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * rates
    a, b = x.split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
