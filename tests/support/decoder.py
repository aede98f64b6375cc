"""The decoder of the package with few channels, and its channels by hand."""

from __future__ import annotations

from torch import nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.specs import MapBuilder
from offload_sparse.workloads.models.decoder import Block, Decoder


def small_decoder(layers: int = 2) -> Decoder:
    """int64[N, L] to float[N, L, 11]; its queries, keys and values have biases."""
    model = Decoder(num_classes=11, width=48, hidden=20, layers=layers, heads=8, kv_heads=4)
    for block in model.blocks:
        for name in "qkv":
            layer = block.attention.get_submodule(name)
            setattr(block.attention, name, nn.Linear(layer.in_features, layer.out_features))
    return model


def decoder_map(model: nn.Module) -> ChannelMap:
    """Widths of the gated units, and key-value heads with the query heads that read them."""
    builder = MapBuilder(model)
    for name, module in model.named_modules():
        if isinstance(module, Block):
            builder.width((f"{name}.gate", f"{name}.up"), f"{name}.down")
            names = [f"{name}.attention.{layer}" for layer in "qkvo"]
            builder.heads(names[0], names[1], names[2], names[3], module.attention.head_size)
    return builder.build()
