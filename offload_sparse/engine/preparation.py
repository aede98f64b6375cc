"""From a user's model to a checked channel map and a filled store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.stream_add import expose_additions
from offload_sparse.channels.subnet import (
    build_on_meta,
    hollow_copy,
    meta_copy,
    other_tensors,
    require_places,
)
from offload_sparse.engine.distributed import on_first_rank
from offload_sparse.engine.pretrained import FittedWeights
from offload_sparse.store.initialisation import Recording, build_seeded, named_tensors, record
from offload_sparse.store.weight_store import WeightStore

logger = logging.getLogger(__name__)

ModelSource = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class PreparedModel:
    """A model whose structure is known and checked.

    Attributes:
        source: the model, or the function that builds it.
        meta_model: the full model without values.
        recording: how its initial values come about; None for a model that brings its own."""

    source: ModelSource
    meta_model: nn.Module
    channel_map: ChannelMap
    recording: Recording | None

    def fill(self, store: WeightStore, seed: int, weights: FittedWeights | None = None) -> None:
        """Give ``store`` the initial values, the same for every world size.

        They are those of ``weights``, as far as these go. Others are replayed tensor by tensor on every rank
        where that gives the values of the construction. Otherwise rank 0 holds the whole model once and
        streams its rows to their owners.
        """
        if weights is None or not named_tensors(self.meta_model).keys() <= weights.stored.keys():
            self._initialise(store, seed)
        if weights is not None:
            weights.fill(store)
        for name, value in store.integer_buffers.items():  # what is read may be of another type in its file
            store.integer_buffers[name] = value.to(self.meta_model.get_buffer(name).dtype)

    def _initialise(self, store: WeightStore, seed: int) -> None:
        if self.recording is not None and self.recording.replayable:
            store.fill(self.recording.replay(seed))
            return
        tensors = None
        if store.ranks.rank == 0:
            if self.recording is not None:
                logger.warning("model built whole on rank 0 and streamed out: %s", self.recording.reason)
            source = self.source
            tensors = named_tensors(source if isinstance(source, nn.Module) else build_seeded(source, seed))
            shapes = store.channel_map.shapes.items()
            tensors |= {name: torch.zeros(shape) for name, shape in shapes if name not in tensors}
        store.fill_from_first_rank(tensors)

    def tensor_names(self, dtype: torch.dtype = torch.float32) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the parameters, and of the buffers, that a store of ``dtype`` has the rows of, in the
        model's order."""
        parameters = tuple(name for name, _ in self.meta_model.named_parameters())
        return parameters, sliced_buffers(self.meta_model, self.channel_map, dtype)


def sliced_buffers(model: nn.Module, channel_map: ChannelMap, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the buffers that a store of ``dtype`` has the rows of. Others are whole on every rank, as they
    are: integers, and what is meant to be more exact than the weights, of which nothing can be dropped."""
    kinds = {dtype, *(p.dtype for p in model.parameters())}
    most = max(torch.finfo(kind).bits for kind in kinds)
    return tuple(
        name
        for name, b in model.named_buffers()
        if b.is_floating_point()
        and (torch.finfo(b.dtype).bits <= most or any(axis is not None for axis in channel_map.axes[name]))
    )


def prepare(
    source: ModelSource,
    example_inputs: tuple[Tensor, ...],
    residual: Residual,
    channel_map: ChannelMap | None = None,
    verify: bool = True,
    block: str | int = 1,
) -> PreparedModel:
    """Find the channels of a model and check them. Raises ValueError: the model cannot be narrowed, or its
    map is wrong (on every rank).

    Args:
        source: a model with values, or a function that builds one.
        example_inputs: inputs that the model can be called with; only shapes and types matter.
        channel_map: a map made by hand, which replaces the discovery.
        verify: check that slice = mask, on the first rank; large models are checked as a narrow twin.
        block: channels per atom; see ``channels.atoms``."""
    if isinstance(source, nn.Module):
        recording, meta_model = None, meta_copy(source)
    else:
        recording = record(source)
        # As readers build it: a constructor may keep values outside of its parameters and buffers.
        meta_model = recording.model if recording.replayable else build_on_meta(source)
        if any(value.is_meta for value in other_tensors(meta_model)):
            meta_model = build_on_meta(source)
    _refuse_wrapped(meta_model)
    _refuse_odd_parameters(meta_model)
    require_places(meta_model)
    if channel_map is None:
        channel_map = discover(meta_model, example_inputs, residual)
    channel_map = block_atoms(channel_map, block)
    expose_additions(meta_model, channel_map.additions)
    if verify:
        from offload_sparse.channels.check import lacks_values, self_test

        checked = channel_map

        def test() -> None:
            model = meta_model
            if lacks_values(model):
                model = hollow_copy(source) if isinstance(source, nn.Module) else build_seeded(source, 0)
                expose_additions(model, checked.additions)
            self_test(model, example_inputs, checked)

        on_first_rank(test)
    return PreparedModel(source, meta_model, channel_map, recording)


def _refuse_wrapped(model: nn.Module) -> None:
    """What is written of such a network could not be read back."""
    if isinstance(model, DataParallel | DistributedDataParallel) or (
        "_orig_mod" in model._modules or "_original_forward" in vars(model)
    ):
        raise ValueError(
            "the model has been through accelerator.prepare, torch.compile or a data-parallel wrapper; give "
            "the network itself, with Forward(accelerator.autocast) or Setup(compile=True) for what they did"
        )


def _refuse_odd_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            advice = "keep torch.view_as_real of it" if parameter.is_complex() else "register it as a buffer"
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"parameter {name!r} is {kind}; only real numbers are trained: {advice}")
