"""A family of networks in one: members that are parts of one another, trained together as the largest.

Every step trains the largest member, the smallest and one of those between (the sandwich rule of Yu and
Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019), each on the labels: on
what the largest says, as there, the smaller ones hold it back while it knows little (see ``bench study``).
All share their weights but those of norms: each normalises by the statistics of its own activations (those
of its batches in training, its own running ones at the end), and has a scale and a shift of its own. These
are parameters of the full network beside those of the largest member, so that they are stored, gathered,
reduced, stepped and saved as all others are. Until the final mask is chosen they are 0; then they start from
what the search has left of the shared ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection, open_grid, restrict
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import meta_copy, narrow_module, tensor_setter
from offload_sparse.engine.batch_norm import is_norm
from offload_sparse.engine.transfers import Transfers
from offload_sparse.policy.samplers import mask_generator

_OF = "_of_member_"


def with_own_norms(model: nn.Module, channel_map: ChannelMap, members: int) -> tuple[nn.Module, ChannelMap]:
    """``model`` on the meta device, and its map, with a scale and a shift of every norm for each of so many
    members smaller than the largest, whose are the shared ones."""
    if not members:
        return model, channel_map
    model, shapes, axes = meta_copy(model), dict(channel_map.shapes), dict(channel_map.axes)
    for name, parameter in list(model.named_parameters()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if parameter.dim() == 1 and is_norm(owner):
            for number in range(members):
                own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
                owner.register_parameter(f"{leaf}{_OF}{number}", own)
                shapes[f"{name}{_OF}{number}"], axes[f"{name}{_OF}{number}"] = shapes[name], axes[name]
    return model, replace(channel_map, shapes=shapes, axes=axes)


def without_own_norms(network: nn.Module) -> nn.Module:
    """``network`` itself, after ``with_own_norms`` only the largest member."""
    for module in network.modules():
        for leaf in [leaf for leaf in module._parameters if _OF in leaf]:
            del module._parameters[leaf]
    return network


def own_entries(channel_map: ChannelMap) -> int:
    """Entries of all scales and shifts that belong to a single smaller member, of the full network."""
    return sum(prod(shape) for name, shape in channel_map.shapes.items() if _OF in name)


def start_own_norms(transfers: Transfers, mask: Tensor) -> None:
    """Give the members' own scales and shifts within ``mask`` (bool[C]) the values and optimizer slots of the
    shared ones. Between two rounds; every rank calls it."""
    side = transfers.scratch()
    side.load(transfers.selection(mask), transfers.pair.trained_kinds)
    for kind, array in side.arrays.items():
        layout = side.narrow(kind).layout
        for name in (name for name in layout.shapes if _OF in name):
            layout.view(array, name).copy_(layout.view(array, name.partition(_OF)[0]))
    transfers.put_back([side])


class Family:
    """The smaller members of a network in training.

    Args:
        model: the full network on the meta device; where members have norms of their own, with these.
        masks: bool[C] each, from the smallest to the largest; each holds the one before.
        seed: of the choice of the members in training; equal on all ranks."""

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
        self._members: list[tuple[nn.Module, list[str], dict[str, tuple[Tensor, ...]]]] = []
        for mask in masks[:-1]:
            kept = Selection(inside, mask[largest])
            grids = {
                name: tuple(index.to(device) for index in open_grid(kept.kept[name], inside.shapes[name]))
                for name in inside.shapes
            }
            member = without_own_norms(narrow_module(meta_copy(model), channel_map, mask))
            set_additions(member, Selection(channel_map, mask), device)
            tensors = chain(member.named_parameters(), member.named_buffers())
            self._members.append((member, [name for name, tensor in tensors if tensor.is_meta], grids))

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
        set_tensor = tensor_setter(member)
        for name, tensor in self._tensors(number, network).items():
            set_tensor(name, tensor.detach().clone())
        return member.train(network.training)

    def _tensors(self, number: int, network: nn.Module) -> dict[str, Tensor]:
        """What ``network`` holds of the member, as copies: norms count their batches in buffers."""
        _, names, grids = self._members[number]
        whole = dict(chain(network.named_parameters(), network.named_buffers()))
        held = {name: whole.get(f"{name}{_OF}{number}", whole[name]) for name in names}
        return {
            name: tensor[grids[name]] if name in grids and tensor.dim() else tensor.clone()
            for name, tensor in held.items()
        }

    def loss(
        self, loss_fn: Callable[..., tuple[Tensor, Any]], network: nn.Module, members: Sequence[int]
    ) -> tuple[Tensor, Any]:
        """The mean loss of the largest and of ``members``, and what ``loss_fn`` measures of the largest.

        Args:
            loss_fn: (network, of one input that gives logits) -> (loss, metrics).
            members: those that are trained beside it, as ``chosen`` names them."""
        loss, metrics = loss_fn(network)
        for number in members:
            loss = loss + loss_fn(partial(self, number, network))[0]
        return loss / (1 + len(members)), metrics
