"""The first values of a network, whichever way they are to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from offload_sparse.store.initialisation import Recording


def build_seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network as ``torch.manual_seed(seed); factory()`` gives it; the caller's random state stays as it
    is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def initial_tensors(
    recording: Recording, factory: Callable[[], nn.Module], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, one at a time when the recording can be replayed, else of a network
    built whole.
    """
    if recording.replayable:
        yield from recording.replay(seed)
        return
    yield from named_tensors(build_seeded(factory, seed)).items()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}
