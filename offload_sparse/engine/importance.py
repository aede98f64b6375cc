"""How much the atoms of a network matter, by its weights alone: what one-shot cuts go by.

Of each tensor the norms of its slices count relative to their mean, so that layers compare; an atom has the
mean over the tensors that give its channel (filters), and over the scales of norms on it. Where no norm
scales a channel (the width of an MLP, attention heads), what reads it counts as much as what gives it.

    l1, l2       norm of the filters (Li et al. 2017)
    norm_scale   scale of the norm (Liu et al. 2017) times l2
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.subnet import output_dimension
from offload_sparse.engine.batch_norm import is_norm
from offload_sparse.policy.config import StartName
from offload_sparse.policy.samplers import mask_generator, uniforms
from offload_sparse.store.partition import row_shape
from offload_sparse.store.weight_store import WEIGHTS, WeightStore

_BLOCK = 1 << 20
_GIVES, _READS, _SCALES = range(3)


class Importance:
    """Sums over the entries of a network's tensors, taken in row by row.

    Args:
        kind: ``l1``, ``l2``, ``norm_scale``, or ``random``, which looks at no weight.
        network: on any device; tells which dimension of a weight gives channels.
        seed: of ``random``."""

    def __init__(self, kind: StartName, channel_map: ChannelMap, network: nn.Module, seed: int = 0) -> None:
        self._kind, self._map, self._seed = kind, channel_map, seed
        self._power = 1 if kind == "l1" else 2
        self._roles: dict[tuple[str, int], int] = {}
        for name, parameter in network.named_parameters():
            owner = network.get_submodule(name.rpartition(".")[0])
            gives = output_dimension(owner)
            for dim, axis in enumerate(channel_map.axes.get(name, ())):
                if axis is not None and parameter.dim() > 1 and dim < 2:
                    self._roles[name, dim] = _GIVES if dim == gives else _READS
                elif axis is not None and is_norm(owner) and name.endswith("weight"):
                    self._roles[name, dim] = _SCALES
        shapes = channel_map.shapes
        self._sums = {key: torch.zeros(shapes[key[0]][key[1]]).double() for key in self._roles}

    def add(self, name: str, first: int, rows: Tensor) -> None:
        """Take in the rows of a tensor from ``first`` on."""
        for dim in (d for n, d in self._roles if n == name):
            sums, others = self._sums[name, dim], [d for d in range(rows.dim()) if d != dim]
            at = first
            for part in rows.detach().split(max(1, _BLOCK // max(1, row_shape(tuple(rows.shape))[1]))):
                powers = part.double().abs().pow(self._power)
                powers = powers.sum(others) if others else powers
                into = sums[at : at + len(part)] if dim == 0 else sums
                into += powers
                at += len(part)

    def of_atoms(self) -> Tensor:
        """float64[C], of what has been taken in; 1 in the mean."""
        count = self._map.num_atoms
        if self._kind == "random":
            return 2 * uniforms(count, mask_generator(self._seed, 0, 0))
        found = torch.zeros(3, count + 1, dtype=torch.float64)  # the last is of what no atom is at
        times = torch.zeros_like(found)
        for (name, dim), role in self._roles.items():
            axis = self._map.axes[name][dim]
            assert axis is not None
            norms = self._sums[name, dim].pow(1 / self._power)
            places = torch.where((axis < 0) | (axis >= count), count, axis)
            found[role].index_add_(0, places, norms / norms.mean().clamp_min(1e-30))
            times[role].index_add_(0, places, torch.ones_like(norms))
        gives, reads, scales = torch.where(times > 0, found / times.clamp_min(1), 1.0)[:, :count]
        scaled = times[_SCALES, :count] > 0
        if self._kind == "norm_scale":
            gives = torch.where(scaled, gives * scales, gives)
        return torch.where(scaled, gives, gives * reads)

    @staticmethod
    def of_store(kind: StartName, store: WeightStore, network: nn.Module, seed: int) -> Tensor:
        """float64[C] of what all ranks have in their rows of ``store``; every rank calls it."""
        found = Importance(kind, store.channel_map, network, seed)
        for name in store.partitions[WEIGHTS].layout.shapes:
            found.add(name, store.own_range(name)[0], store.own_rows(name))
        if store.ranks.world_size > 1 and found._sums:
            flat = torch.cat(list(found._sums.values()))
            dist.all_reduce(flat, group=store.ranks.host_group)
            parts = flat.split([len(sums) for sums in found._sums.values()])
            found._sums = dict(zip(found._sums, parts, strict=True))
        return found.of_atoms()

    @staticmethod
    def of_tensors(
        kind: StartName,
        channel_map: ChannelMap,
        network: nn.Module,
        tensors: Iterable[tuple[str, Tensor]],
        seed: int,
    ) -> Tensor:
        """float64[C] of whole tensors, one at a time."""
        found = Importance(kind, channel_map, network, seed)
        for name, tensor in tensors:
            found.add(name, 0, tensor)
        return found.of_atoms()
