"""The two subnets of a round on the device, and the weights they share.

    subnet a: weights | gradients | slots | buffers        subnet b: weights | slots and buffers, if trained
                 |                                                      ^
                 +---- shared entries: one block copy after each step --+

An entry that both masks keep is one weight with one momentum. After a step on one subnet the other gets its
new value, so the pair behaves as if both were views of the full weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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


class Side:
    """One subnet: its module, its selection, and its flat buffers.

    Attributes:
        arrays: flat narrow buffers by kind (weights, slots, buffers), views of memory that is reused by later
            rounds.
        weights, buffers: the places of its entries in the two kinds of flat buffers.
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
        self._places = [(layer, leaf, layer._buffers) for layer, leaf, value in buffers if value is not None]
        self._plain = [place[1:] for place in self._places if not isinstance(place[0], _BatchNorm)]
        self._held: list[tuple[nn.Module, str, Tensor]] = []  # every buffer, as it was bound
        self._others: list[Tensor] = []  # those that are not of a BatchNorm
        self.arrays: dict[str, Tensor] = {}
        self.weights: Narrow
        self.buffers: Narrow
        self._store = store
        self._device = device
        self._capacity = capacity
        self._memory: dict[str, Tensor] = {}

    @property
    def module(self) -> nn.Module:
        return self.subnet.module

    @property
    def selection(self) -> Selection:
        return self.weights.selection

    def narrow(self, kind: str) -> Narrow:
        """Where the entries of arrays of ``kind`` lie."""
        return self.buffers if kind == BUFFERS else self.weights

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
        """Gather ``kinds`` of ``selection`` from the store."""
        self.select(selection, kinds)
        self.gather()

    def gather(self) -> None:
        """Fill the arrays from the store."""
        for kind, array in self.arrays.items():
            self._store.gather(self.narrow(kind), kind, array)

    def bind(self) -> None:
        """Point the module at the arrays."""
        self.subnet.bind(self.selection, self.arrays[WEIGHTS], self.arrays[BUFFERS], self.weights.step)
        held = ((layer, leaf, of_layer[leaf]) for layer, leaf, of_layer in self._places)
        self._held = [(layer, leaf, own) for layer, leaf, own in held if own is not None]
        self._others = [own for leaf, of_layer in self._plain if (own := of_layer[leaf]) is not None]

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
        kept = [(own, own.clone()) for own in self._others]
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
                torch._foreach_copy_([own for own, _ in kept], [value for _, value in kept])

    def _refuse(self, layer: nn.Module, leaf: str, before: str, after: str) -> None:
        name = next(name for name, module in self.module.named_modules() if module is layer)
        buffer = f"{name}.{leaf}".lstrip(".")
        raise ValueError(
            f"the forward pass turns buffer {buffer!r} from {before} into {after}; a subnet keeps the "
            "buffers that the network is built with: register it in the constructor, in its final shape"
        )

    @property
    def nbytes(self) -> int:
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

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


class SubnetPair:
    """The trained subnet and its reference.

    Args:
        capacity: entries that are set aside for the weights of a subnet, once.
        integer_buffers: buffers that are not sliced, on the device; all subnets share them.

    Attributes:
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
        self._store = store
        self._optimizer = optimizer
        a, b = (Side(store, model, device, capacity, integer_buffers) for _ in range(2))
        self.sides = a, b
        self._zeros = torch.zeros(aligned(store.dtype), dtype=store.dtype, device=device)
        self.gradients: dict[int, FlatGradients] = {}
        self._optimizers: list[FlatOptimizer | None] = [None, None]
        self.shared: dict[str, BlockPlan] = {}
        self.trained_kinds = (WEIGHTS, *optimizer.slots, BUFFERS)
        self.loaded = False
        self.same, self.masks = True, tuple[Tensor, ...]()
        self.train_second = False

    def select(
        self, first: Selection, second: Selection | None, train_second: bool, masks: Sequence[Tensor]
    ) -> None:
        """Make room for a round; what the arrays hold is not defined.

        Args:
            first: selection of subnet a, which is trained.
            second: selection of subnet b; None when no rank has anything to compare.
            train_second: b takes turns in training, so it needs its optimizer slots too.
            masks: those of the subnets of all ranks, which ``holds`` compares.
        """
        self.same, self.masks = second is None, tuple(masks)
        self.train_second = train_second
        self._optimizers, self.gradients = [None, None], {}  # they hold the views of the last round
        self.shared.clear()
        a, b = self.sides
        a.select(first, self.trained_kinds)
        if second is not None:
            b.select(second, self.trained_kinds if train_second else (WEIGHTS, BUFFERS))
        self.loaded = True

    @property
    def active(self) -> tuple[Side, ...]:
        return self.sides[:1] if self.same else self.sides

    @property
    def trained(self) -> tuple[Side, ...]:
        """The sides whose weights move."""
        return self.sides if self.train_second else self.sides[:1]

    def holds(self, masks: Sequence[Tensor], train_second: bool) -> bool:
        """Whether the pair is made of these masks already, on every rank."""
        if not self.loaded or self.trained_kinds != tuple(self.sides[0].arrays):
            return False
        same = len(masks) == len(self.masks) and all(map(torch.equal, masks, self.masks))
        return same and self.train_second == train_second

    def bind(self, reduce_memory: Tensor) -> None:
        """Make the modules and the optimizers those of the arrays, which are full now; ``reduce_memory`` is
        at least as long as the weights of either side and ``TAIL`` scalars."""
        for side in self.active:
            side.bind()
        for index, side in enumerate(self.trained):
            size = side.arrays[WEIGHTS].numel() + TAIL
            parameters, layout = side.subnet.parameters, side.weights.layout
            self.gradients[index] = FlatGradients(parameters, reduce_memory[:size], layout, self._zeros)
            self._optimizers[index] = self._optimizer_of(index)

    def optimizer_step(self, side: int, not_finite: Tensor, steps_done: int) -> None:
        """Step one side; nothing moves where ``not_finite`` (a scalar on the device) is not 0."""
        optimizer = self._optimizers[side]
        assert optimizer is not None, "this side was loaded without its optimizer slots"
        optimizer.step(not_finite, steps_done)

    def copy_shared(self, side: int) -> None:
        """Copy the entries that ``side`` has just trained to the other side, where that keeps them too."""
        a, b = self.sides
        for like, plan in self.shared.items():
            kinds = [kind for kind in b.arrays if (kind == BUFFERS) == (like == BUFFERS)]
            copy_blocks(plan, [(a.arrays[kind], b.arrays[kind]) for kind in kinds], reverse=side == 1)

    def take_over(self, rank: int, ranks: Ranks) -> None:
        """Go on with weights, slots and scalars of the optimizer as ``rank`` has them. Every rank calls
        it."""
        for side in self.trained:
            for kind, array in side.arrays.items():
                if kind != BUFFERS:
                    dist.broadcast(array, rank)
        if not self.train_second:
            self.copy_shared(0)
        self._optimizer.take_over(rank, ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of both subnets: weights, slots, statistics."""
        return sum(side.nbytes for side in self.active)

    def _optimizer_of(self, side: int) -> FlatOptimizer:
        arrays, gradients = self.sides[side].arrays, self.gradients[side].flat
        groups = self._optimizer.slices(self.sides[side].weights.layout)
        return FlatOptimizer(
            self._optimizer,
            [arrays[WEIGHTS][group] for group in groups],
            [gradients[group] for group in groups],
            [{name: arrays[name][group] for name in self._optimizer.slots} for group in groups],
        )
