"""The control ``dense``: the full network on the device."""

from __future__ import annotations

from torch import nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.subnet import meta_copy
from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.network_method import FixedNetwork
from offload_sparse.store.initialisation import build_seeded, named_tensors


def build(task: Task) -> Method:
    """The full network, initialised as the seed says. It needs no discovery: nothing is ever dropped."""
    module = build_seeded(task.factory, task.config.train.seed)
    channel_map = undivided_map(module)
    cost = CostModel(meta_copy(module), channel_map, task.example_inputs)
    return FixedNetwork(task, module, channel_map, channel_map.full_mask(), cost)


def undivided_map(module: nn.Module) -> ChannelMap:
    """The map of a network of which no channel can be dropped."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(module).items() if t.is_floating_point()}
    return ChannelMap((), shapes, {name: (None,) * len(shape) for name, shape in shapes.items()})
