"""The losses of several masks between two rounds: the final one is the best of those drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.engine.distributed import average
from offload_sparse.engine.forward import Closure, Forward
from offload_sparse.engine.transfers import Transfers
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks


def losses_of(
    masks: Sequence[Tensor],
    closures: Sequence[Closure],
    channel_map: ChannelMap,
    transfers: Transfers,
    forward: Forward,
    ranks: Ranks,
) -> Tensor:
    """float64[masks]: the loss of the subnet of every mask, averaged over ``closures`` and ranks; zeros when
    there are no closures. Every rank calls it."""
    side = transfers.scratch()
    losses = torch.zeros(len(masks), dtype=torch.float64, device=side.subnet.device)
    for i, mask in enumerate(masks if closures else ()):
        side.load(Selection(channel_map, mask), (WEIGHTS, BUFFERS))
        side.bind()
        for closure in closures:
            with side.buffers_untouched():
                losses[i] += forward.evaluated(side.module, closure) / len(closures)
    average(losses, ranks.world_size)
    return losses.cpu()
