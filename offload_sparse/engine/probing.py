"""Forward passes between two rounds: losses of several masks, and a probe of the present widths.

A probe compares the subnet in training with itself, a few of its channels left out. Nothing is gathered for
that: the entries of dropped atoms are zero (which equals leaving them out), and the columns that read the
survivors of a group are scaled by what makes up for the dropped ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import output_dimension
from offload_sparse.engine.batch_norm import flags_restored
from offload_sparse.engine.distributed import average
from offload_sparse.engine.forward import Closure, Forward
from offload_sparse.engine.transfers import Transfers
from offload_sparse.policy.probe import Comparisons, survivor_scales
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.store.copy.tables import to_device
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks


def losses_of(
    masks: Sequence[Tensor],
    closures: Sequence[Closure],
    transfers: Transfers,
    forward: Forward,
    ranks: Ranks,
) -> Tensor:
    """float64[masks]: the loss of the subnet of every mask, averaged over ``closures`` and ranks; zeros when
    there are no closures. Every rank calls it."""
    side = transfers.scratch()
    losses = torch.zeros(len(masks), dtype=torch.float64, device=transfers.device)
    for i, mask in enumerate(masks if closures else ()):
        side.load(transfers.selection(mask), (WEIGHTS, BUFFERS))
        for closure in closures:
            with side.buffers_untouched():
                losses[i] += forward.evaluated(side.module, closure) / len(closures)
    return average(losses, ranks.world_size).cpu()


def probed(
    search: WidthSearch,
    closures: Sequence[Closure],
    transfers: Transfers,
    forward: Forward,
    ranks: Ranks,
) -> tuple[Comparisons, Tensor]:
    """``run_probe`` of the weights that are in the store, between two rounds."""
    side = transfers.scratch()
    side.load(transfers.selection(search.mask), (WEIGHTS, BUFFERS))
    with side.put_back():
        return run_probe(search, side.module, side.selection, closures, forward, ranks)


@torch.no_grad()
def run_probe(
    search: WidthSearch,
    module: nn.Module,
    selection: Selection,
    closures: Sequence[Closure],
    forward: Forward,
    ranks: Ranks,
) -> tuple[Comparisons, Tensor]:
    """Compare ``search.pairs`` pairs on this rank, others on every other rank; every rank calls it.
    ``module`` is the subnet of ``selection``, which is that of ``search.mask``; its weights are put back at
    the end. ``closures`` are losses of this rank's batches, in turns. Returns the comparisons of all ranks,
    and the importance of every present atom, float64[C]."""
    rates = search.rates()
    thinned = _Thinned(module, selection, survivor_scales(search.mask, search.groups, rates))
    found, pairs, differences = Comparisons(search.groups), [], []
    with flags_restored(module):
        module.eval()  # also BatchNorm: a batch's statistics would make up for what is dropped
        for number in range(search.pairs if closures else 0):
            pair = search.pair(number * ranks.world_size + ranks.rank, rates)
            closure = closures[number % len(closures)]
            first, second = (thinned.loss(mask, closure, forward) for mask in pair)
            pairs.append(pair)
            differences.append(first - second)
    thinned.restore()
    if pairs:
        for difference, pair in zip(torch.stack(differences).tolist(), pairs, strict=True):
            found.add(difference, search.mask, *pair)
    if ranks.world_size > 1:
        summed = torch.cat([found.sums.flatten(), torch.tensor([found.count], dtype=torch.float64)])
        dist.all_reduce(summed, group=ranks.host_group)
        found.sums, found.count = summed[:-1].view_as(found.sums), int(summed[-1])
    return found, thinned.importance()


class _Thinned:
    """A subnet of which atoms can be left out."""

    def __init__(self, module: nn.Module, selection: Selection, scales: Tensor) -> None:
        self._module, self._map = module, selection.channel_map
        self._weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        always = torch.ones(self._map.num_ids + 2 - self._map.num_atoms, dtype=torch.float64)
        self._scales = torch.cat([scales, always])
        # By parameter: (dimension, what lies at each of its positions).
        self._axes: dict[str, list[tuple[int, Tensor]]] = {}
        # The factors of all axes are gathered at once, from those of what stays and, behind them, those of
        # what reads it; ``_parts`` are the stretches of a parameter's axes, with the shapes that multiply it.
        self._parts: list[tuple[nn.Parameter, Tensor, list[tuple[slice, list[int]]]]] = []
        places, end = [torch.zeros(0, dtype=torch.int64)], 0
        for name, parameter in module.named_parameters():
            weight, size = self._weights[name], len(self._scales)
            reads = 1 - output_dimension(module.get_submodule(name.rpartition(".")[0]))
            axes, parts = self._axes.setdefault(name, []), list[tuple[slice, list[int]]]()
            for dim, axis in enumerate(self._map.axes.get(name, ())):
                if axis is not None:
                    kept = selection.kept[name][dim]
                    ids = axis if kept is None else axis[kept]
                    axes.append((dim, ids))
                    places.append(ids % size + (size if weight.dim() > 1 and dim == reads else 0))
                    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
                    parts.append((slice(end, end + len(ids)), shape))
                    end += len(ids)
            self._parts.append((parameter, weight, parts))
        self._places = torch.cat(places)
        self._device = next(module.parameters()).device

    def loss(self, mask: Tensor, closure: Closure, forward: Forward) -> Tensor:
        """Of the subnet without the atoms that ``mask`` drops: a scalar on the device."""
        alive = self._map.alive(mask).to(torch.float64)
        factors = to_device(torch.cat([alive, alive * self._scales])[self._places], self._device)
        of_dtype = {weight.dtype: factors.to(weight.dtype) for _, weight, _ in self._parts}
        for parameter, weight, parts in self._parts:
            of_axes = [of_dtype[weight.dtype][stretch].view(shape) for stretch, shape in parts]
            if of_axes:  # all but one of which are zeros and ones, so that the order does not matter
                torch.mul(weight, reduce(torch.mul, of_axes), out=parameter)
        return forward.loss(self._module, closure).double()

    def restore(self) -> None:
        for name, parameter in self._module.named_parameters():
            parameter.copy_(self._weights[name])

    def importance(self) -> Tensor:
        """float64[C]: mean square of an atom's entries, relative to the mean of its layer, over all tensors
        that it is in."""
        total = torch.zeros(self._map.num_ids + 2, dtype=torch.float64)
        count = torch.zeros_like(total)
        for name, axes in self._axes.items():
            for dim, ids in axes:
                weight = self._weights[name].double().cpu()
                others = [d for d in range(weight.dim()) if d != dim]
                square = weight.square().mean(others) if others else weight.square()
                where = ids % len(total)
                total.index_add_(0, where, square / square.mean().clamp_min(1e-30))
                count.index_add_(0, where, torch.ones_like(square))
        return (total / count.clamp_min(1))[: self._map.num_atoms]


