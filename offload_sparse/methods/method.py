"""What a training step is: the protocol that every method speaks, and what all of them are built from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.durable import DurableRounds
from offload_sparse.engine.forward import Forward, Metrics
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.pretrained import FittedWeights
from offload_sparse.engine.state import MethodState
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.store.initialisation import build_seeded
from offload_sparse.store.tiers import Mode

LossFunction = Callable[..., tuple[Tensor, Metrics]]
"""(module, batch) -> mean loss of the batch, and further scalars to be averaged over ranks."""


@dataclass(frozen=True)
class Task:
    """What a method trains.

    Attributes:
        example_inputs: tensors that the network can be called with, on the meta device.
        dtype: type of weights, slots and gradients.
        forward: autocast and BatchNorm mode of forward passes.
        store_mode: how weights in files are taken: those of an earlier part of the run, or new ones.
        warmup_steps: steps in which the learning rate rises."""

    config: RunConfig
    factory: Callable[[], nn.Module]
    example_inputs: tuple[Tensor, ...]
    loss_fn: LossFunction
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    forward: Forward
    store_mode: Mode = "replace"
    weights: FittedWeights | None = None
    warmup_steps: int = 0

    def network(self) -> nn.Module:
        """The full network with the values that training starts from."""
        network = build_seeded(self.factory, self.config.train.seed)
        if self.weights is not None:
            self.weights.into(network)
        return network


class Method(Protocol):
    """A way to train. One instance serves one run.

    Attributes:
        channel_map: channels of the full network; without groups where none can be dropped.
        durable: of a method whose weights are in files: the log of its rounds."""

    channel_map: ChannelMap
    cost: CostModel
    durable: DurableRounds | None = None

    def train_step(self, batch: Any, lr: float) -> None:
        """One optimizer step on this rank's part of the batch. Does not wait for the device."""

    def span(self, step: int) -> tuple[int, int]:
        """First and last step of what the learning rate's schedule spans at ``step``: the whole run, unless a
        search goes in cycles or begins without training."""

    def records(self) -> list[StepRecord]:
        """Losses and metrics of the steps since the last call, averaged over ranks."""

    def unread_records(self) -> list[StepRecord]:
        """Those of the steps since the last call of ``records`` that are known without waiting."""
        return []

    def status(self) -> dict[str, float]:
        """Figures about the structure as it is now, for the progress bar and the log."""

    def dynamics(self) -> dict[str, Any]:
        """Expected ``params_ratio`` and ``flops_ratio`` of the networks that are being trained, and what the
        search for a structure has done since the last call; logged per epoch. Counts begin anew."""

    @property
    def spent_flops(self) -> float:
        """FLOPs per image of all passes run so far; a backward pass counts as two forward passes."""

    def report(self) -> dict[str, Any]:
        """Figures of the method for ``summary.json``; they replace those that the trainer counts.
        ``store_bytes`` are those of this rank's rows of the store, ``subnet_bytes_peak`` the most that
        weights, gradients, slots and statistics have taken on the device."""

    def evaluation(self, batches: Iterable[Tensor]) -> AbstractContextManager[nn.Module]:
        """The network as it is now, ready to be evaluated; ``batches`` serve the BatchNorm statistics."""

    def finalize(self, batches: Iterable[Tensor]) -> FinalNetwork:
        """End the training and hand out the final network."""

    def state(self) -> MethodState | None:
        """Everything that the next steps depend on; None in the middle of a round: ask again after the next
        step. Never None before the first step. Read the records first: they are no part of it."""

    def restore(self, state: MethodState) -> None:
        """Resume from a state, bit for bit on as many ranks as wrote it.

        ``state.sharded`` holds the tensors of an earlier ``state()`` of this method, already read into.
        Raises ValueError: the state belongs to another model or configuration."""

    def recall(self, batches: Iterable[Any]) -> None:
        """After ``restore``: the last ``final.selection_batches`` batches before its position."""
        del batches  # by which some structures are chosen

    def while_saving(self, release: Callable[[], object]) -> None:
        """``state.sharded`` is being read: call ``release`` before changing what it refers to (any number of
        times)."""
        del release  # of a state that is no copy

    def close(self, abandon: bool) -> None:
        """End what works beside the loop, whatever has ended that; ``abandon``: a rank may be gone."""
        del abandon  # of a method whose work is all in the loop, as here
