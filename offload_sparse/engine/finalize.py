"""The end of a session: the losses of the masks it may end with, and its network out of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import fit_attributes, meta_copy, set_tensor
from offload_sparse.engine.distributed import average
from offload_sparse.engine.rounds import Forward, LossFunction
from offload_sparse.engine.subnet_pair import Side
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks


def losses_of(
    side: Side,
    channel_map: ChannelMap,
    masks: Sequence[Tensor],
    batches: Sequence[tuple[Any, LossFunction]],
    forward: Forward,
    ranks: Ranks,
) -> Tensor:
    """float64[masks]: the training loss of the subnet of every mask, averaged over ``batches`` and ranks;
    zeros when there are no batches. ``side`` is used to measure them.
    """
    losses = torch.zeros(len(masks), dtype=torch.float64, device=side.subnet.device)
    for i, mask in enumerate(masks if batches else ()):
        selection = Selection(channel_map, mask)
        side.load(selection, (WEIGHTS, BUFFERS))
        side.bind(None)
        for batch, loss_fn in batches:
            losses[i] += forward.evaluated(side.module, batch, loss_fn) / len(batches)
    average(losses, ranks.world_size)
    return losses.cpu()


def extract(meta_model: nn.Module, side: Side) -> nn.Module:
    """The network that ``side`` holds, as a module with memory of its own, in evaluation mode."""
    module = meta_copy(meta_model)
    for name, parameter in list(side.module.named_parameters()):
        set_tensor(
            module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        )
    for name, buffer in list(side.module.named_buffers()):
        set_tensor(module, name, buffer.detach().clone())
    fit_attributes(module)
    assert side.selection is not None
    set_additions(module, side.selection, side.subnet.device)
    return module.eval()
