"""The self-test before training: slice = mask on the model itself, or on a narrow twin where the model is
large.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_sparse.channels.accounting import count_parameters
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import Verification, check
from offload_sparse.channels.selection import restrict
from offload_sparse.channels.subnet import meta_copy, narrow_module, set_tensor

MAX_PARAMETERS = 2_000_000
"""Larger networks are tested as a narrow twin: 16 MB of float64 weights, whatever the size of the model."""


def self_test(model: nn.Module, example_inputs: tuple[Tensor, ...], channel_map: ChannelMap) -> Verification:
    """Check ``channel_map`` before a network trains on it.

    The twin keeps every layer and every tie between channels but fewer channels of each group, so a map that
    is wrong about the structure fails on it too, while neither memory nor time grow with the width of the
    model.

    Args:
        model: the full network, on any device; values do not matter.
        example_inputs: shapes of the inputs.
        channel_map: the map to test.

    Raises:
        ValueError: slice and mask differ; names the worst tensor.
    """
    twin, twin_map = reduced(model, channel_map, MAX_PARAMETERS)
    return check(twin, tuple(torch.empty_like(x, device="cpu") for x in example_inputs), twin_map)


def reduced(model: nn.Module, channel_map: ChannelMap, max_parameters: int) -> tuple[nn.Module, ChannelMap]:
    """A narrow twin of at most ``max_parameters`` (at least four channels per group), and its map."""
    twin, ratio = meta_copy(model), 1.0
    mask = channel_map.full_mask()
    while count_parameters(twin) > max_parameters and ratio > 1 / 64:
        ratio /= 2
        mask = channel_map.uniform_mask(ratio, min_width=4)
        twin = narrow_module(meta_copy(model), channel_map, mask)
    for name, buffer in _constants(model).items():
        if twin.get_buffer(name).shape == buffer.shape:
            set_tensor(twin, name, buffer.clone())
    return twin, restrict(channel_map, mask)


def lacks_values(model: nn.Module) -> bool:
    """Whether a model on the meta device cannot be tested, since it reads buffers of unknown values."""
    return any(buffer.is_meta and buffer.numel() for buffer in _constants(model).values())


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no random values can stand for, such as indices and masks."""
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[0] not in norms}
