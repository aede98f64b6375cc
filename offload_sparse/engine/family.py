"""A family of networks in one: members that are parts of one another, trained together as the largest.

Every step trains the largest member on the labels, and the smallest and one of those between on what the
largest says (sandwich rule and inplace distillation; Yu and Huang, "Universally Slimmable Networks and
Improved Training Techniques", ICCV 2019). All share their weights; each normalises by the statistics of its
own activations: those of its batches in training, its own running ones at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection, open_grid, restrict
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import meta_copy, narrow_module, set_tensor
from offload_sparse.policy.samplers import mask_generator


class Family:
    """The smaller members of a network in training.

    Args:
        model: the full network on the meta device.
        channel_map: its channels.
        masks: bool[C] each, from the smallest to the largest; each holds the one before.
        seed: of the choice of the members in training; equal on all ranks.
        device: of the network."""

    def __init__(
        self,
        model: nn.Module,
        channel_map: ChannelMap,
        masks: Sequence[Tensor],
        seed: int,
        device: torch.device,
    ) -> None:
        largest = masks[-1]
        inside = restrict(channel_map, largest)
        self._seed = seed
        self._members: list[tuple[nn.Module, set[str], dict[str, tuple[Tensor, ...]]]] = []
        for mask in masks[:-1]:
            kept = Selection(inside, mask[largest])
            grids = {
                name: tuple(index.to(device) for index in open_grid(kept.kept[name], inside.shapes[name]))
                for name in inside.shapes
            }
            member = narrow_module(meta_copy(model), channel_map, mask)
            set_additions(member, Selection(channel_map, mask), device)
            tensors = chain(member.named_parameters(), member.named_buffers())
            shared = {name for name, tensor in tensors if tensor.is_meta}
            self._members.append((member, shared, grids))

    def chosen(self, step: int) -> list[int]:
        """The members that ``step`` trains beside the largest: the smallest, and one of those between."""
        between = len(self._members) - 1
        if between < 1:
            return list(range(len(self._members)))
        draw = torch.randint(between, (), generator=mask_generator(self._seed, step))
        return [0, 1 + int(draw)]

    def __call__(self, number: int, network: nn.Module, *inputs: Any) -> Any:
        """What member ``number`` says; gradients reach the weights of ``network``, which holds it."""
        member, *_ = self._members[number]
        for own, other in zip(member.modules(), network.modules(), strict=True):
            own.training = other.training
        return functional_call(member, self._tensors(number, network), inputs)

    def extract(self, number: int, network: nn.Module) -> nn.Module:
        """Member ``number`` with memory of its own, in the modes of ``network``."""
        member = copy.deepcopy(self._members[number][0])
        for name, tensor in self._tensors(number, network).items():
            set_tensor(member, name, tensor.detach().clone())
        return member.train(network.training)

    def _tensors(self, number: int, network: nn.Module) -> dict[str, Tensor]:
        """What the member shares with ``network``, as copies: norms count their batches in buffers."""
        _, shared, grids = self._members[number]
        return {
            name: tensor[grids[name]] if name in grids and tensor.dim() else tensor.clone()
            for name, tensor in chain(network.named_parameters(), network.named_buffers())
            if name in shared
        }

    def loss(
        self, loss_fn: Callable[..., tuple[Tensor, Any]], network: nn.Module, step: int
    ) -> tuple[Tensor, Any]:
        """The mean loss of the members in training, and what ``loss_fn`` measures of the largest.

        Args:
            loss_fn: (network, of one input that gives logits) -> (loss, metrics).
            network: the largest."""
        seen: list[tuple[Any, Tensor]] = []

        def recorded(inputs: Any) -> Tensor:
            seen.append((inputs, network(inputs)))
            return seen[-1][1]

        loss, metrics = loss_fn(recorded)
        [(inputs, logits)] = seen
        said, members = logits.detach().softmax(1), self.chosen(step)
        for number in members:
            loss = loss + F.cross_entropy(self(number, network, inputs), said)
        return loss / (1 + len(members)), metrics
