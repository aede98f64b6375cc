"""Attention of which only some heads are kept.

``nn.MultiheadAttention`` takes the width of a head to be embed_dim / num_heads, so it cannot say "three heads
of 64 channels on an embedding of 768". When heads are dropped from one, it becomes a ``HeadAttention`` in
place: the same module, the same parameters by the same names, another ``forward``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class HeadAttention(nn.MultiheadAttention):
    """Attention over ``num_heads`` heads of ``head_dim`` channels each, whatever ``embed_dim`` is.

    Tensors: in_proj_weight [3 · num_heads · head_dim, embed_dim], out_proj.weight [embed_dim, num_heads ·
    head_dim]. Made by ``fit_attention`` only.
    """

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
        """Outputs float[N, L, embed_dim] of float[N, L or S, embed_dim], and None for the weights.

        Raises:
            ValueError: attention weights are asked for, or keys are masked one by one.
        """
        del average_attn_weights
        if need_weights or key_padding_mask is not None:
            raise ValueError(
                "attention with dropped heads gives no attention weights and takes no key_padding_mask; "
                "call it with need_weights=False"
            )
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        if attn_mask is not None and not attn_mask.is_floating_point():
            attn_mask = ~attn_mask  # there True hides a position, here it shows one
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask, self.dropout if self.training else 0.0, is_causal and attn_mask is None
        )
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


def is_packed_attention(module: nn.Module) -> bool:
    """Whether this is timm's ``Attention`` (layers ``qkv`` and ``proj``) without gate or norm over heads."""
    return (
        type(module).__name__ == "Attention"
        and all(hasattr(module, name) for name in ("num_heads", "head_dim", "attn_dim"))
        and isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and getattr(module, "gate", None) is None
        and isinstance(getattr(module, "norm", None), nn.Identity)
    )


def fit_attention(layer: nn.Module) -> None:
    """Make the number of heads of an attention module agree with its tensors; other modules stay."""
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
        rows = layer.in_proj_weight.shape[0]
        if rows != 3 * layer.embed_dim:
            layer.__class__ = HeadAttention
            # Keeps nn.TransformerEncoderLayer off its fused kernel, which knows nothing of this.
            layer._qkv_same_embed_dim = False
        if isinstance(layer, HeadAttention):
            layer.num_heads = rows // (3 * layer.head_dim)
    elif is_packed_attention(layer):
        packed: Any = layer
        packed.attn_dim = packed.qkv.weight.shape[0] // 3
        packed.num_heads = packed.attn_dim // packed.head_dim
