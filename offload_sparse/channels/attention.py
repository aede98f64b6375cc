"""Attention of which only some heads are kept.

``nn.MultiheadAttention`` takes the width of a head to be embed_dim / num_heads, so it cannot say "three heads
of 64 channels on an embedding of 768". When heads are dropped from one, it becomes a ``HeadAttention`` in
place: the same module, the same parameters by the same names, another ``forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadAttention(nn.MultiheadAttention):
    """Attention over ``num_heads`` heads of ``head_dim`` channels each, whatever ``embed_dim`` is.

    Tensors: in_proj_weight [3 · num_heads · head_dim, embed_dim], or three of them where keys or values have
    another width; out_proj.weight [embed_dim, num_heads · head_dim]. Made by ``drop_heads`` only."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs float[N, L, embed_dim] of float[N, L or S, embed_dim], and the weights if they are needed:
        float[N, heads, L, S], or their mean over the heads that are left, which keeps discovery from dropping
        any. With ``batch_first=False``, length comes before batch."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        three = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        parts = three if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip((query, key, value), parts, biases, strict=True)
        )
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:  # [N · heads, L, S]
            mask = mask.unflatten(0, (len(q), -1))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None]  # type: ignore[index]
            mask = padding if mask is None else mask + padding
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, self.dropout, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            dropout = self.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), weights


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the scores; True in one of booleans hides a position."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def drop_heads(layer: nn.Module) -> None:
    """Make torch's attention a ``HeadAttention`` where nothing is added to keys and values; other modules
    stay."""
    if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is None and not layer.add_zero_attn:
        layer.__class__ = HeadAttention
        # Keeps nn.TransformerEncoderLayer off its fused kernel, which knows nothing of this.
        layer._qkv_same_embed_dim = False


def fit_attention(layer: nn.Module) -> None:
    """Make the number of heads of an attention module agree with its tensors; other modules stay."""
    if isinstance(layer, nn.MultiheadAttention):
        whole = layer.in_proj_weight
        rows = layer.q_proj_weight.shape[0] if whole is None else whole.shape[0] // 3
        if rows != layer.embed_dim:
            drop_heads(layer)
        if isinstance(layer, HeadAttention):
            layer.num_heads = rows // layer.head_dim
