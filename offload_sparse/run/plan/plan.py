"""What a run will take, worked out before anything is allocated.

    per rank         in host memory                  on the device
    whole run        rows of the store (tier ram)    two pairs of subnets (one with transfer full),
                     or in files (tier file)         gradients, batches kept for the final mask
    for a moment     one tensor of the model         activations of a forward and backward pass,
                     being made, or a teacher        entries that arrive from other ranks or are staged
                     at work; staging (CUDA)

A network that does not change (``dense``, ``static``) takes its weights, gradients, slots and statistics on
the device, as DistributedDataParallel holds them: on several ranks the gradients once more, in buckets.
On a CUDA device the arrays of subnets are allocated at ``policy.hard_cap``, and all of it counts. On a CPU
the device's bytes are host memory too, of which only what is written takes any: that of the masks of the
first rounds. Not counted: what libraries allocate by themselves (workspaces of kernels, a CUDA context).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.channels.selection import Layout, Selection
from offload_sparse.channels.stream_add import expose_additions
from offload_sparse.config.methods import StaticConfig
from offload_sparse.config.run import RunConfig, resolve
from offload_sparse.engine.config import FinalConfig
from offload_sparse.engine.family import Family, with_own_norms
from offload_sparse.engine.optimizer import slot_names
from offload_sparse.engine.preparation import sliced_buffers
from offload_sparse.policy.width_search import MEMORY_ROOM
from offload_sparse.run.plan.dry_run import Structure, structure_of, trained_masks
from offload_sparse.run.plan.first_rounds import FirstRounds, Side
from offload_sparse.run.plan.live_bytes import Loss, labels_shape, step_peak
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.teacher import BATCH
from offload_sparse.store.copy.device_copy import STAGE
from offload_sparse.store.copy.plans import WIRE
from offload_sparse.store.direct_files import WINDOW
from offload_sparse.store.partition import Partition
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS
from offload_sparse.workloads.data.loader import DeclaredData
from offload_sparse.workloads.data.order import steps_per_epoch

PLANNED = ("dense", "static", "sparse_offload")
"""Methods whose memory is known beforehand."""

ROUNDS = 4
"""Rounds whose masks are drawn to find the largest."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        store, files: this rank's rows, in host memory or in files.
        initialising: host memory beside the store before the first step, while values are made, or a teacher
            looks at the images.
        staging: page-locked memory between store and device, or files.
        subnets: weights, optimizer slots, statistics and gradients of the subnets: what is allocated on a
            CUDA device, what is ever written on a CPU.
        reserved: what is allocated for them; the same on a CUDA device.
        activations: largest transient of a step on the device, the batches that are kept included.
        on_host: the subnets compute in host memory."""

    store: int
    files: int
    initialising: int
    staging: int
    subnets: int
    reserved: int
    activations: int
    on_host: bool

    @property
    def device(self) -> int:
        return self.subnets + self.activations

    @property
    def host(self) -> int:
        """Host memory that is written, beyond the process's own at the start."""
        return self._host(self.subnets)

    @property
    def host_allocated(self) -> int:
        """Host memory that is asked for: with what subnets at the hard cap would write."""
        return self._host(self.reserved)

    def _host(self, subnets: int) -> int:
        training = self.staging + (subnets + self.activations if self.on_host else 0)
        return self.store + max(self.initialising, training)


MOVED_PASSES = 1.15 * MEMORY_ROOM
"""What the passes of moved widths may take, relative to those of the first ones: their layers put out so
much, and the largest ones a little more of it."""


class Planner:
    """Memory and traffic of one network for any rho, tier and world size. The run may be of any method; what
    is said of rounds and of the store is about sparse_offload."""

    def __init__(self, config: RunConfig, data: DeclaredData, structure: Structure) -> None:
        self.config = config
        self.structure = structure
        self.data = data
        expose_additions(structure.model, structure.channel_map.additions)
        members = len(config.policy.budgets) - 1 if config.method == "sparse_offload" else 0
        self._model, self.channel_map = with_own_norms(structure.model, structure.channel_map, members)
        parameters = tuple(name for name, _ in self._model.named_parameters())
        dtype = getattr(torch, config.train.dtype)
        self._slots = slot_names(config.optim)
        self._names = dict.fromkeys((WEIGHTS, *self._slots), parameters)
        self._names |= {BUFFERS: sliced_buffers(self._model, self.channel_map, dtype)}
        self._item = dtype.itemsize

    @classmethod
    def of(cls, config: RunConfig, data: DeclaredData, machine: Machine) -> Planner:
        """For a run on ``machine``, whose device says what ``auto`` is."""
        config = resolve(config, "cpu" if machine.device is None else "cuda")
        return cls(config, data, structure_of(config, data))

    def memory(self, machine: Machine, rounds: int = ROUNDS) -> Memory:
        """Bytes that a rank of ``machine`` takes, over its first ``rounds`` rounds where there are any.
        Raises ValueError: the method is none whose memory is known."""
        method = self.config.method
        if method in ("dense", "static"):
            return self._network_memory(machine)
        if method != "sparse_offload":
            raise ValueError(f"only {', '.join(PLANNED)} runs are planned, not {method}; set method to one")
        first = self.first_rounds(rounds, machine.ranks)
        rows, on_disk = self.store_bytes(machine.ranks), self.config.store.tier != "ram"
        cuda = machine.device is not None
        return Memory(
            store=0 if on_disk else rows,
            files=rows if on_disk else 0,
            initialising=self.initialising_bytes(),
            staging=(2 * self._part_bytes(first, STAGE) + self._averaged(first, machine) if cuda else 0)
            + self._window_bytes(),
            subnets=(first.reserved if cuda else first.touched) * self._item,
            reserved=first.reserved * self._item,
            activations=self.step_bytes(first, machine),
            on_host=not cuda,
        )

    def _network_memory(self, machine: Machine) -> Memory:
        """Bytes of a rank that trains the network of one mask from start to end."""
        selection = Selection(self.channel_map, trained_masks(self.config, self.structure)[-1])
        weights, buffers = (
            sum(prod(selection.shapes[name]) for name in self._names[kind]) * self._item
            for kind in (WEIGHTS, BUFFERS)
        )
        held = weights * (2 + len(self._slots) + (machine.ranks > 1)) + buffers
        images = self._images(machine)
        passes = step_peak(self._model, selection, images, self._loss, self.config.train, kept_gradients=True)
        whole = sum(prod(self.channel_map.shapes[name]) for name in self._names[WEIGHTS])
        built = max(4 * whole if self.config.method == "dense" else 0, self.initialising_bytes())
        activations = passes + self._batch_bytes(images)
        return Memory(0, 0, built, 0, held, held, activations, on_host=machine.device is None)

    def first_rounds(self, rounds: int, ranks: int = 1) -> FirstRounds:
        images, batch = self.data.train_images, self.config.data.batch_size
        steps = self.config.train.steps(steps_per_epoch(images, batch))
        given = self.config, self.channel_map, self.structure.cost, self._names
        return FirstRounds(*given, rounds, steps, ranks)

    def store_bytes(self, ranks: int) -> int:
        """Bytes of the largest share of weights, slots and statistics that a rank holds."""
        shapes = self.channel_map.shapes
        parts = {
            kind: Partition(Layout.of({n: tuple(shapes[n]) for n in self._names[kind]}), ranks)
            for kind in (WEIGHTS, BUFFERS)
        }
        outer = self.config.round.outer_momentum > 0
        copies = {WEIGHTS: 1 + len(self._slots) + outer, BUFFERS: 1}
        held = [sum(copies[k] * part.shard(r).size for k, part in parts.items()) for r in range(ranks)]
        return max(held) * self._item

    def initialising_bytes(self) -> int:
        """Bytes beside the store while tensors are replayed, the largest one, in the model's float32; or, if
        they are more, of the whole network while it is a teacher, with the images that it looks at."""
        largest = 4 * max((prod(self.channel_map.shapes[name]) for name in self._names[WEIGHTS]), default=0)
        train, model, channel_map = self.config.train, self.structure.model, self.structure.channel_map
        if not train.distill:
            return largest
        (example,) = self.structure.inputs
        images = example.expand(BATCH, *example.shape[1:])
        train = replace(train, precision="no" if train.dtype == "float32" else "float64")
        whole = Selection(channel_map, channel_map.full_mask())
        passes = step_peak(model, whole, images, self._loss, train, trained=False)
        held = sum(map(prod, channel_map.shapes.values())) * self._item
        return max(largest, held + self._batch_bytes(images) + passes)

    def step_bytes(self, first: FirstRounds, machine: Machine) -> int:
        """Bytes that come and go on the device, and of the batches that are kept.

        What arrives from other ranks, or is staged for a CUDA device, does so between the steps; with overlap
        (which a CUDA device takes unless told otherwise) during them."""
        config = self.config
        images = self._images(machine)
        batch = self._batch_bytes(images)
        # The session keeps the last batches for the final mask and its statistics; the newest is among them.
        kept = max(1, FinalConfig.selection_batches)
        largest = max(first.rounds, key=lambda sides: max(first.entries(s, WEIGHTS) for s in sides))
        moves = bool(first.family) and not first.stays
        passes = self._passes(first, largest, images)
        passes = round(MOVED_PASSES * passes) if moves else passes
        cuda = machine.device is not None
        moved = 2 * self._part_bytes(first, WIRE) if machine.ranks > 1 else 0  # one on its way, one packed
        moved += self._part_bytes(first, STAGE) if cuda else 0
        averaged = 0 if cuda else self._averaged(first, machine)
        overlaps = config.round.overlaps(cuda) and not first.stays
        return kept * batch + max(averaged, passes + moved if overlaps else max(passes, moved))

    def traffic(self, machine: Machine, rounds: int = ROUNDS) -> tuple[float, float]:
        """Bytes that a rank moves from one round to the next: (to the device, back), means over rounds."""
        first = self.first_rounds(rounds, machine.ranks)
        to_device, back = first.traffic()
        share = self._item / (1 if first.own_subnets else machine.ranks)
        return to_device * share, back * share

    def sent(self, machine: Machine, rounds: int = ROUNDS) -> float:
        """Bytes that a rank sends to other ranks per step of the search, a mean over rounds: the gradients of
        every step in a ring, or what ranks agree on at the end of a round; and what subnets are made from.
        """
        ranks, k = machine.ranks, self.config.round.k
        first = self.first_rounds(rounds, ranks)
        learned = [[s for s in sides if s.trained] for sides in first.rounds]
        if self.config.round.sync == "round":
            agreed = [sum(first.entries(s, kind) for s in sides for kind in s.kinds) for sides in learned]
            per_step = sum(agreed) / len(agreed) / k
        else:
            gradients = [sum(first.entries(s, WEIGHTS) for s in sides) / len(sides) for sides in learned]
            per_step = 2 * sum(gradients) / len(gradients)
        return (per_step + first.traffic()[0] / k) * self._item * (ranks - 1) / ranks

    def with_method(self, method: str) -> Planner:
        train, static = self.config.train, self.config.static
        if method != "sparse_offload" and train.precision == "fp16":  # refused there, and bf16 takes as much
            train = replace(train, precision="bf16")
        if method != self.config.method and self.config.policy.search in ("sampled", "forward"):
            static = StaticConfig()  # such a search is refused with them
        return self.having(method=method, train=train, static=static)

    def with_rho(self, rho: float) -> Planner:
        return self.having(policy=replace(self.config.policy, rho=rho))

    def having(self, **changes: Any) -> Planner:
        """For the same network with other settings."""
        return Planner(replace(self.config, **changes), self.data, self.structure)

    def _window_bytes(self) -> int:
        """Bytes of the windows through which files are read past the page cache."""
        return max(2, 1 + len(self._slots)) * WINDOW if self.config.store.tier == "nvme" else 0

    def _part_bytes(self, first: FirstRounds, limit: int) -> int:
        """Most bytes of a part of a transfer: ``limit`` entries, or a single tensor that has more."""
        subnets = [s.selection.shapes for sides in first.rounds for s in sides]
        tensor = max(prod(shapes[name]) for shapes in subnets for name in self._names[WEIGHTS])
        whole = max(first.entries(s, WEIGHTS) for sides in first.rounds for s in sides)
        return max(tensor, min(limit, whole)) * self._item

    def _averaged(self, first: FirstRounds, machine: Machine) -> int:
        """Bytes in host memory of what a rank sends and receives at the end of a round that it has trained by
        itself, one side after the other, and of the means.
        """
        if self.config.round.sync == "step" or machine.ranks == 1:
            return 0
        sides = [side for sides in first.rounds for side in sides if side.trained]
        return 2 * max(sum(first.entries(s, kind) for kind in s.kinds) for s in sides) * self._item

    def _passes(self, first: FirstRounds, sides: tuple[Side, ...], images: Tensor) -> int:
        """Most bytes of the passes of a round, the copy of the trained side's statistics included."""
        loss = self._sandwich(first.family) if len(first.family) > 1 else self._loss
        train = self.config.train
        peaks = [step_peak(self._model, s.selection, images, loss, train, s.trained) for s in sides]
        statistics = max(first.entries(s, BUFFERS) for s in sides if s.trained)
        return max(peaks) + statistics * self._item

    def _images(self, machine: Machine) -> Tensor:
        """A rank's part of a batch, on the meta device."""
        (example,) = self.structure.inputs
        shape = (-(-self.config.data.batch_size // machine.ranks), *example.shape[1:])
        return torch.empty(shape, dtype=example.dtype, device="meta")

    def _batch_bytes(self, images: Tensor) -> int:
        item = self._item if images.is_floating_point() else images.itemsize
        return images.numel() * item + labels_shape(images).numel() * torch.int64.itemsize

    def _loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        smoothing, labels = self.config.optim.label_smoothing, batch[1].flatten()
        return F.cross_entropy(module(batch[0]).flatten(0, -2), labels, label_smoothing=smoothing)

    def _sandwich(self, masks: Sequence[Tensor]) -> Loss:
        """The loss of a step of a family, on the largest of the members that take turns."""
        values = self.config.train.autocast != "no" or bool(self.data.tokens)
        family = Family(self._model, self.channel_map, masks, 0, torch.device("cpu" if values else "meta"))
        beside = list(dict.fromkeys([0, len(masks) - 2]))
        return lambda module, batch: family.loss(
            lambda network: (self._loss(network, batch), {}), module, beside
        )[0]
