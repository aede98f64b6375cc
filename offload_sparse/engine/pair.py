"""The two subnets of a round on the device, and the weights they share.

    subnet a: weights | gradients | slots | buffers        subnet b: weights | slots and buffers, if trained
                 |                                                      ^
                 +---- shared entries: one index copy after each step --+

An entry that both masks keep is one weight with one momentum. After a step on one subnet its twin in the
other is overwritten, so the pair behaves as if both were views of the full weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload_sparse.config import OptimConfig
from offload_sparse.engine.optimizer import FlatOptimizer
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, WeightStore
from offload_sparse.structure.selection import Selection, shared_positions
from offload_sparse.structure.subnet import Subnet

TAIL = 8
"""Scalars (losses, metrics) that ride behind the gradients in the all-reduce."""


class Side:
    """One subnet: its module, its selection, and its flat buffers.

    Attributes:
        arrays: flat narrow buffers by kind (weights, slots, buffers), views of memory that is reused by later
            rounds.
    """

    def __init__(self, store: WeightStore, model: nn.Module, device: torch.device) -> None:
        self.subnet = Subnet(model, device, store.integer_buffers)
        self.arrays: dict[str, Tensor] = {}
        self.selection: Selection | None = None
        self._store = store
        self._device = device
        self._memory: dict[str, Tensor] = {}

    @property
    def module(self) -> nn.Module:
        return self.subnet.module

    def load(self, selection: Selection, kinds: tuple[str, ...]) -> None:
        """Gather ``kinds`` of ``selection`` from the store."""
        self.selection = selection
        self.arrays = {}
        for kind in kinds:
            size = selection.layout(self._store.partitions[kind].layout.shapes).size
            self.arrays[kind] = self._reserve(kind, size)
            self._store.gather(selection, kind, self.arrays[kind])

    def bind(self, gradients: Tensor | None) -> None:
        """Point the module at the buffers just loaded."""
        assert self.selection is not None
        self.subnet.bind(self.selection, self.arrays[WEIGHTS], gradients, self.arrays[BUFFERS])

    def save(self, kinds: tuple[str, ...]) -> None:
        """Scatter ``kinds`` back into the store."""
        assert self.selection is not None
        for kind in kinds:
            self._store.scatter(self.selection, kind, self.arrays[kind])

    @property
    def nbytes(self) -> int:
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def _reserve(self, kind: str, size: int) -> Tensor:
        memory = self._memory.get(kind)
        if memory is None or memory.numel() < size:
            # Freed first, so that old and new never exist together; a little room keeps the next round from
            # growing it.
            self._memory.pop(kind, None)
            self.arrays.pop(kind, None)
            self.subnet.release()
            self._memory[kind] = torch.empty(size + size // 32, dtype=self._store.dtype, device=self._device)
        return self._memory[kind][:size]


@dataclass
class _Twins:
    """Positions of the shared entries, for weights-like and for buffers-like arrays, in sides a and b."""

    weights: tuple[Tensor, Tensor]
    buffers: tuple[Tensor, Tensor]


class SubnetPair:
    """The trained subnet and its reference, gathered from one store.

    Args:
        store: the full weights.
        model: the full model on the meta device.
        optim: the optimizer of the weights.
        device: where the subnets compute.
    """

    def __init__(
        self, store: WeightStore, model: nn.Module, optim: OptimConfig, device: torch.device
    ) -> None:
        self._store = store
        self._optim = optim
        self._device = device
        self.sides = (Side(store, model, device), Side(store, model, device))
        self._reduce_memory = torch.empty(0, dtype=store.dtype, device=device)
        self._optimizers: list[FlatOptimizer | None] = [None, None]
        self._twins: _Twins | None = None
        self._patch_kinds: tuple[str, ...] = ()
        self.same = True
        self.bytes_peak = 0

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        return (WEIGHTS, *self._store.slots, BUFFERS)

    def load(self, first: Selection, second: Selection | None, train_second: bool, steps_done: int) -> None:
        """Gather a round.

        Args:
            first: selection of subnet a, which is trained.
            second: selection of subnet b; None (or the same mask) when there is nothing to compare.
            train_second: b takes turns in training, so it needs its optimizer slots too.
            steps_done: optimizer steps of the run so far.
        """
        self.same = second is None or torch.equal(first.mask, second.mask)
        a, b = self.sides
        self._optimizers = [
            None,
            None,
        ]  # they hold the buffers of the last round, which may have to make room
        self._twins = None
        a.load(first, self.trained_kinds)
        sizes = [a.arrays[WEIGHTS].numel()]
        if not self.same:
            assert second is not None
            self._patch_kinds = self.trained_kinds if train_second else (WEIGHTS,)
            b.load(second, self.trained_kinds if train_second else (WEIGHTS, BUFFERS))
            sizes.append(b.arrays[WEIGHTS].numel())
        self._reserve_gradients(max(sizes if train_second else sizes[:1]))
        a.bind(self.gradients(0))
        self._optimizers[0] = self._optimizer(0, steps_done)
        if not self.same:
            b.bind(self.gradients(1) if train_second else None)
            if train_second:
                self._optimizers[1] = self._optimizer(1, steps_done)
        self.bytes_peak = max(self.bytes_peak, self.nbytes)

    def gradients(self, side: int) -> Tensor:
        """Flat gradients of a side; both sides use the same memory, since only one is trained at a time."""
        return self._reduce_memory[: self.sides[side].arrays[WEIGHTS].numel()]

    def reduce_buffer(self, side: int) -> Tensor:
        """Gradients of a side and, behind them, ``TAIL`` scalars."""
        return self._reduce_memory[: self.sides[side].arrays[WEIGHTS].numel() + TAIL]

    def optimizer_step(self, side: int, lr: float) -> None:
        """Step one side and carry the shared entries over to the other."""
        optimizer = self._optimizers[side]
        assert optimizer is not None, "this side was loaded without its optimizer slots"
        optimizer.step(lr)

    def patch(self, side: int) -> None:
        """Overwrite the twins, in the other side, of the entries that ``side`` has just trained."""
        if self._twins is None:
            self._twins = self._find_twins()
            self.bytes_peak = max(self.bytes_peak, self.nbytes)
        source, target = self.sides[side], self.sides[1 - side]
        for kind in self._patch_kinds:
            positions = self._twins.buffers if kind == BUFFERS else self._twins.weights
            values = source.arrays[kind].index_select(0, positions[side])
            target.arrays[kind].index_copy_(0, positions[1 - side], values)

    def trained_sides(self, trained_second: bool) -> tuple[Side, ...]:
        """The sides whose weights have moved."""
        return self.sides if trained_second and not self.same else self.sides[:1]

    def save(self, trained_second: bool) -> None:
        """Scatter what was trained back into the store and forget the round's selections."""
        for side in self.trained_sides(trained_second):
            side.save(self.trained_kinds)
        self._forget()

    def discard(self) -> None:
        """Forget the round without writing anything back."""
        self._forget()

    @property
    def nbytes(self) -> int:
        """Bytes of both subnets: weights, slots, statistics, gradients, positions of shared entries."""
        tensors = [self._reduce_memory]
        if self._twins is not None:
            tensors += [*self._twins.weights, *self._twins.buffers]
        sides = self.sides[: 1 if self.same else 2]
        return sum(s.nbytes for s in sides) + sum(t.numel() * t.element_size() for t in tensors)

    def _optimizer(self, side: int, steps_done: int) -> FlatOptimizer:
        arrays = self.sides[side].arrays
        slots = {name: arrays[name] for name in self._store.slots}
        return FlatOptimizer(self._optim, arrays[WEIGHTS], self.gradients(side), slots, steps_done)

    def _reserve_gradients(self, size: int) -> None:
        if self._reduce_memory.numel() < size + TAIL:
            for side in self.sides:
                side.subnet.release()
            self._reduce_memory = torch.empty(0, dtype=self._store.dtype, device=self._device)
            self._reduce_memory = torch.empty(
                size + size // 32 + TAIL, dtype=self._store.dtype, device=self._device
            )

    def _find_twins(self) -> _Twins:
        a, b = self.sides[0].selection, self.sides[1].selection
        assert a is not None
        assert b is not None
        weights = shared_positions(a, b, tuple(self._store.partitions[WEIGHTS].layout.shapes))
        buffers = shared_positions(a, b, tuple(self._store.partitions[BUFFERS].layout.shapes))
        return _Twins(
            (weights[0].to(self._device), weights[1].to(self._device)),
            (buffers[0].to(self._device), buffers[1].to(self._device)),
        )

    def _forget(self) -> None:
        for side in self.sides:
            if side.selection is not None:
                self._store.forget(side.selection)
