"""The two subnets of a round on the device, and the weights they share.

    subnet a: weights | gradients | slots | buffers        subnet b: weights | slots and buffers, if trained
                 |                                                      ^
                 +---- shared entries: one block copy after each step --+

An entry that both masks keep is one weight with one momentum. After a step on one subnet the other gets its
new value, so the pair behaves as if both were views of the full weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_sparse.channels.selection import Selection, aligned
from offload_sparse.channels.subnet import Subnet
from offload_sparse.engine.gradients import FlatGradients
from offload_sparse.engine.losses import TAIL
from offload_sparse.engine.optimizer import FlatOptimizer, SubnetOptimizer
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.copy import copy_blocks
from offload_sparse.store.copy.plans import Narrow
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore


@dataclass(eq=False)
class Piece:
    """Entries of a subnet.

    Attributes:
        weights, buffers: their places in the two kinds of flat buffers.
        arrays: narrow flat buffers by kind (weights, slots, buffers).
    """

    weights: Narrow
    buffers: Narrow
    arrays: dict[str, Tensor]

    @property
    def selection(self) -> Selection:
        return self.weights.selection

    def narrow(self, kind: str) -> Narrow:
        """Where the entries of arrays of ``kind`` lie."""
        return self.buffers if kind == BUFFERS else self.weights

    def packed(self) -> dict[str, Tensor]:
        """The arrays without gaps, as they are saved."""
        return {kind: self.narrow(kind).layout.packed(array) for kind, array in self.arrays.items()}


class Side(Piece):
    """One subnet on the device: its module and its flat buffers, views of memory that is reused by later
    rounds.
    """

    def __init__(
        self,
        store: WeightStore,
        model: nn.Module,
        device: torch.device,
        capacity: int,
        integer_buffers: Mapping[str, Tensor],
    ) -> None:
        self.subnet = Subnet(model, device, integer_buffers)
        self.subnet.parameter_names = tuple(store.partitions[WEIGHTS].layout.shapes)
        self._layers = list(self.subnet.module.modules())
        self._norms = [layer for layer in self._layers if isinstance(layer, _BatchNorm)]
        self._slots = sum(len(layer._buffers) for layer in self._layers)
        buffers = [(layer, *entry) for layer in self._layers for entry in layer._buffers.items()]
        self._places = [(layer, leaf) for layer, leaf, value in buffers if value is not None]
        self._held: list[tuple[nn.Module, str, Tensor]] = []  # every buffer, as it was bound
        self.arrays = {}
        self._store, self._device, self._capacity = store, device, capacity
        self._memory: dict[str, Tensor] = {}

    @property
    def module(self) -> nn.Module:
        return self.subnet.module

    def select(self, selection: Selection, kinds: tuple[str, ...]) -> None:
        """Make room for ``kinds`` of ``selection``; what the arrays hold is not defined."""
        layouts = {kind: p.layout for kind, p in self._store.partitions.items()}
        step = aligned(self._store.dtype)
        self.weights = Narrow(selection, layouts[WEIGHTS].shapes, step)
        self.buffers = Narrow(selection, layouts[BUFFERS].shapes, step)
        self.arrays = {}
        self.arrays = {kind: self._reserve(kind, self.narrow(kind).layout.size) for kind in kinds}
        for kind, array in self.arrays.items():
            if self.narrow(kind).layout.gaps:
                array.zero_()  # what no tensor has is 0, as its gradient is, and stays 0

    def load(self, selection: Selection, kinds: tuple[str, ...]) -> None:
        """Gather ``kinds`` of ``selection`` from the store, for the module."""
        self.select(selection, kinds)
        for kind, array in self.arrays.items():
            self._store.gather(self.narrow(kind), kind, array)
        self.bind()

    def bind(self) -> None:
        """Point the module at the arrays."""
        self.subnet.bind(self.selection, self.arrays[WEIGHTS], self.arrays[BUFFERS], self.weights.step)
        held = ((layer, leaf, layer._buffers[leaf]) for layer, leaf in self._places)
        self._held = [(layer, leaf, own) for layer, leaf, own in held if own is not None]

    def take_buffers(self) -> None:
        """After a forward pass: what it has assigned to buffers goes to the places of these. Raises
        ValueError: a buffer has another shape or type than before, or is new; names it."""
        for layer, leaf, own in self._held:
            value = layer._buffers.get(leaf)
            if value is own:
                continue
            layer._buffers[leaf] = own
            if value is None or value.shape != own.shape or value.dtype != own.dtype:
                self._refuse(layer, leaf, _described(own), _described(value))
            else:
                own.copy_(value.detach())
        for layer, leaf, value in self._new_buffers():
            del layer._buffers[leaf]
            self._refuse(layer, leaf, _described(None), _described(value))

    def _new_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Buffers that a forward pass has registered."""
        if sum([len(layer._buffers) for layer in self._layers]) == self._slots:
            return []
        known = {(id(layer), leaf) for layer, leaf, _ in self._held}
        found = ((layer, *entry) for layer in self._layers for entry in layer._buffers.items())
        new = ((layer, leaf, own) for layer, leaf, own in found if (id(layer), leaf) not in known)
        return [(layer, leaf, own) for layer, leaf, own in new if own is not None]

    @contextmanager
    def put_back(self, *kinds: str) -> Iterator[None]:
        """At the end the arrays of ``kinds`` and all buffers are what they were at the start."""
        owns = [*(self.arrays[kind] for kind in kinds), *(own for _, _, own in self._held)]
        kept = [own.clone() for own in owns]
        try:
            yield
        finally:
            for layer, leaf, _ in self._new_buffers():
                del layer._buffers[leaf]
            for layer, leaf, own in self._held:
                layer._buffers[leaf] = own
            for own, value in zip(owns, kept, strict=True):
                own.copy_(value)

    @contextmanager
    def buffers_untouched(self) -> Iterator[None]:
        """Inside, forward passes leave no trace in the buffers: only the subnet that is trained moves them.
        Training-mode BatchNorm uses batch statistics and leaves the running ones alone.
        """
        others = [own for layer, _, own in self._held if not isinstance(layer, _BatchNorm)]
        kept = [own.clone() for own in others]
        norms = [norm for norm in self._norms if norm.track_running_stats]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True
            for layer, leaf, own in self._held:
                layer._buffers[leaf] = own
            if kept:
                torch._foreach_copy_(others, kept)

    def _refuse(self, layer: nn.Module, leaf: str, before: str, after: str) -> None:
        name = next(name for name, module in self.module.named_modules() if module is layer)
        buffer = f"{name}.{leaf}".lstrip(".")
        raise ValueError(
            f"the forward pass turns buffer {buffer!r} from {before} into {after}; a subnet keeps the "
            "buffers that the network is built with: register it in the constructor, in its final shape"
        )

    def _reserve(self, kind: str, size: int) -> Tensor:
        memory = self._memory.get(kind)
        if memory is None or memory.numel() < size:
            whole = self._store.partitions[kind].layout.size + padding(self._store, kind)
            room = whole if kind == BUFFERS else min(whole, self._capacity)
            # Freed first, so that old and new never exist together. A mask beyond the cap (every channel of a
            # minimum width, say) is the one case that comes here twice.
            self._memory.pop(kind, None)
            self.subnet.release()
            self._memory[kind] = torch.empty(max(size, room), dtype=self._store.dtype, device=self._device)
        return self._memory[kind][:size]


def padding(store: WeightStore, kind: str) -> int:
    """Most entries between the tensors of a narrow array of ``kind``."""
    return (aligned(store.dtype) - 1) * len(store.partitions[kind].layout.shapes)


def _described(buffer: Tensor | None) -> str:
    return "nothing" if buffer is None else f"{buffer.dtype}{list(buffer.shape)}"


@dataclass(frozen=True)
class Wanted:
    """The subnets of a round on this rank.

    Attributes:
        first: selection of subnet a, which is trained.
        second: selection of subnet b; None when no rank has anything to compare.
        train_second: b takes turns in training, so it needs its optimizer slots too.
        per_rank: the selections of b (of a, without a b) on every rank that shares the store, where they
            differ.
    """

    first: Selection
    second: Selection | None = None
    train_second: bool = False
    per_rank: tuple[Selection, ...] = ()

    @property
    def masks(self) -> list[Tensor]:
        """Of the subnets of all ranks that share the store: these exchange them, or none does."""
        second = () if self.second is None else (self.second,)
        return [selection.mask for selection in (self.first, *(self.per_rank or second))]


class SubnetPair:
    """The trained subnet and its reference.

    Args:
        capacity: entries that are set aside for the weights of a subnet, once.
        integer_buffers: buffers that are not sliced, on the device; all subnets share them.

    Attributes:
        wanted: the subnets that it has room for; None when what its arrays hold is not defined.
        gradients: of the sides that are trained, by number; one buffer, since only one is trained at a time.
        shared: from a to b, the entries that both keep, of arrays such as the weights and of statistics.
    """

    def __init__(
        self,
        store: WeightStore,
        model: nn.Module,
        optimizer: SubnetOptimizer,
        device: torch.device,
        capacity: int,
        integer_buffers: Mapping[str, Tensor],
    ) -> None:
        self._optimizer, self._integer_buffers = optimizer, integer_buffers
        a, b = (Side(store, model, device, capacity, integer_buffers) for _ in range(2))
        self.sides = a, b
        self._zeros = torch.zeros(aligned(store.dtype), dtype=store.dtype, device=device)
        self.gradients: dict[int, FlatGradients] = {}
        self._optimizers: dict[int, FlatOptimizer] = {}
        self.shared: dict[str, BlockPlan] = {}
        self.trained_kinds = (WEIGHTS, *optimizer.slots, BUFFERS)
        self.wanted: Wanted | None = None

    def select(self, wanted: Wanted) -> None:
        """Make room for the subnets of a round; what the arrays hold is not defined."""
        self.wanted = wanted
        self._optimizers, self.gradients = {}, {}  # they hold the views of the last round
        self.shared.clear()
        a, b = self.sides
        a.select(wanted.first, self.trained_kinds)
        if wanted.second is not None:
            b.select(wanted.second, self.trained_kinds if wanted.train_second else (WEIGHTS, BUFFERS))

    @property
    def same(self) -> bool:
        """There is no reference."""
        return self.wanted is None or self.wanted.second is None

    @property
    def active(self) -> tuple[Side, ...]:
        return self.sides[:1] if self.same else self.sides

    @property
    def trained(self) -> tuple[Side, ...]:
        """The sides whose weights move."""
        both = self.wanted is not None and self.wanted.train_second
        return self.sides if both else self.sides[:1]

    def holds(self, wanted: Wanted) -> bool:
        """Whether the pair is made of these subnets already, on every rank."""
        held = self.wanted
        if held is None or self.trained_kinds != tuple(self.sides[0].arrays):
            return False
        same = len(wanted.masks) == len(held.masks) and all(map(torch.equal, wanted.masks, held.masks))
        return same and wanted.train_second == held.train_second

    def bind(self, reduce_memory: Tensor) -> None:
        """Make the modules and the optimizers those of the arrays, which are full now; ``reduce_memory`` is
        at least as long as the weights of either side and ``TAIL`` scalars."""
        for side in self.active:
            side.bind()
        for index, side in enumerate(self.trained):
            size = side.arrays[WEIGHTS].numel() + TAIL
            parameters, layout = side.subnet.parameters, side.weights.layout
            self.gradients[index] = FlatGradients(parameters, reduce_memory[:size], layout, self._zeros)
            slices = self._optimizer.slices(layout)
            self._optimizers[index] = FlatOptimizer(
                self._optimizer, side.arrays, self.gradients[index].flat, slices
            )

    def optimizer_step(self, side: int, not_finite: Tensor, steps_done: int) -> None:
        """Step one side; nothing moves where ``not_finite`` (a scalar on the device) is not 0."""
        self._optimizers[side].step(not_finite, steps_done)

    def copy_shared(self, side: int) -> None:
        """Copy the entries that ``side`` has just trained to the other side, where that keeps them too."""
        a, b = self.sides
        for like, plan in self.shared.items():
            kinds = [kind for kind in b.arrays if (kind == BUFFERS) == (like == BUFFERS)]
            copy_blocks(plan, [(a.arrays[kind], b.arrays[kind]) for kind in kinds], reverse=side == 1)

    def take_over(self, rank: int, ranks: Ranks) -> None:
        """Go on with weights, slots, scalars of the optimizer and counters as ``rank`` has them. Every rank
        calls it."""
        for side in self.trained:
            for kind, array in side.arrays.items():
                if kind != BUFFERS:
                    dist.broadcast(array, rank)
        if len(self.trained) == 1:
            self.copy_shared(0)
        for value in self._integer_buffers.values():
            sent = value.reshape(-1).view(torch.uint8)  # of a type that every backend knows
            dist.broadcast(sent, rank)
            value.copy_(sent.view(value.dtype).view_as(value))
        self._optimizer.take_over(rank, ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of both subnets: weights, slots, statistics."""
        return sum(array.nbytes for side in self.active for array in side.arrays.values())
