"""Which images an optimizer step reads: a function of (seed, epoch, step) alone.

Rank r of R reads the r-th contiguous part of the same global batch for every R, so a run may stop at any step
and resume on another number of ranks without a state to restore.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of uint64 that scatters nearby
    values."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seed_of(*numbers: int) -> int:
    """One seed in [0, 2^63) from several integers; order matters; the same on every machine and for every
    version."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix(state ^ mix(np.array([number % 2**64], dtype=np.uint64)))
    return int(state[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Whole batches in ``size`` images; the rest of an epoch's permutation is left out. Raises ValueError:
    there are fewer images than one batch takes."""
    if size < batch_size:
        raise ValueError(
            f"data.batch_size is {batch_size}, but there are only {size} training images; lower "
            "data.batch_size"
        )
    return size // batch_size


def global_batch(seed: int, epoch: int, step: int, size: int, batch_size: int) -> Tensor:
    """Indices int64[batch_size] of the images of one optimizer step over all ranks: the step-th slice of the
    permutation of ``size`` images in ``epoch`` (both from 0). Raises ValueError: there are fewer images than
    one batch takes."""
    assert 0 <= step < steps_per_epoch(size, batch_size), "the step lies outside the epoch"
    return _permutation(seed, epoch, size)[step * batch_size : (step + 1) * batch_size].clone()


def check_batch(batch_size: int, world_size: int) -> None:
    """Check that every rank can take an equal part of a global batch. Raises ValueError: ``batch_size`` does
    not divide over ``world_size`` ranks."""
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        advice = f"{below} or {below + world_size}" if below else str(world_size)
        raise ValueError(
            f"data.batch_size {batch_size} does not divide over {world_size} ranks; set data.batch_size "
            f"to {advice}"
        )


def rank_part(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """The contiguous part of a global batch int64[b] that ``rank`` reads, int64[b // world_size]; it divides
    over the ranks."""
    share = len(indices) // world_size
    return indices[rank * share : (rank + 1) * share]
