"""What ranks exchange beside weights and gradients: losses, statistics, and what is the same for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Of the default process group; (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def average(buffer: Tensor, world_size: int) -> Tensor:
    """Replace ``buffer`` by its mean over all ranks, in place, with one all-reduce; returns it."""
    if world_size > 1:
        dist.all_reduce(buffer)
        buffer.div_(world_size)
    return buffer


def gathered(own: Tensor, world_size: int) -> Tensor:
    """[ranks, ...]: ``own`` of every rank, on every rank."""
    if world_size == 1:
        return own[None]
    all_ranks = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(all_ranks, own)
    return torch.stack(all_ranks)


def everyones(own: T, world_size: int, group: dist.ProcessGroup | None = None) -> list[T]:
    """``own`` of every rank, an object of any kind, on every rank."""
    found = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(found, own, group=group)
    return found


def ranks_where(condition: bool, world_size: int) -> list[int]:
    """The ranks on which ``condition`` holds; every rank has to ask."""
    return [rank for rank, answer in enumerate(everyones(condition, world_size)) if answer]


def first_word(own: str, world_size: int, group: dist.ProcessGroup | None = None) -> str:
    """What the first rank says that has something to say; every rank has to ask."""
    return next(filter(None, everyones(own, world_size, group)), "")


def require_equal(of_ranks: Mapping[int, Mapping[str, Any]], advice: str) -> None:
    """Compare what ranks have under the same names. Raises ValueError: something differs; names it."""
    (first, expected), *others = of_ranks.items()
    for rank, own in others:
        for name, value in own.items():
            if value != expected.get(name):
                raise ValueError(
                    f"{name} is {expected.get(name)} on rank {first} and {value} on rank {rank}; {advice}"
                )


def describe_fault(step: int, ranks: list[int], loss: float) -> str:
    """One line about a step with a loss or gradient that is not finite."""
    where = f"rank {', '.join(map(str, ranks))}" if ranks else "a rank"
    return (
        f"the loss or gradient of step {step} is not finite on {where} (mean loss {loss}); lower optim.lr, "
        "set optim.clip_norm, or use train.precision no"
    )


def fingerprint(tensors: list[Tensor]) -> str:
    """A digest of the exact bytes of ``tensors``."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assert_equal_on_ranks(
    named: dict[str, list[Tensor]], world_size: int, group: dist.ProcessGroup | None
) -> None:
    """Compare digests over all ranks. Raises RuntimeError: the ranks hold different values; names what
    differs."""
    every = everyones({name: fingerprint(tensors) for name, tensors in named.items()}, world_size, group)
    if differing := [name for name in named if len({own[name] for own in every}) > 1]:
        raise RuntimeError(
            f"ranks disagree about {', '.join(differing)}: they no longer train the same network"
        )


def attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What ``function`` returns on this rank, or the error (of a setting or a file) that it raises, for
    ``agreed``."""
    try:
        return function(), None
    except (ValueError, OSError, SafetensorError) as error:
        return None, error


def agreed(attempted: tuple[T | None, Exception | None], group: dist.ProcessGroup | None = None) -> T:
    """What came of an ``attempt`` on this rank. Every rank has to ask. Raises ValueError: it has failed on
    some rank; the word of the first, on every rank, so that none waits for one that is gone."""
    value, error = attempted
    rank, world_size = rank_and_world_size()
    if world_size == 1 and error is not None:
        raise error
    word = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    if found := first_word(f"rank {rank}: {word}" if word and rank else word, world_size, group):
        raise ValueError(found) from error
    return value  # type: ignore[return-value]


def on_every_rank(function: Callable[[], T]) -> T:
    """What ``function``, which talks to no other rank, returns on this one. Raises ValueError: as
    ``agreed``."""
    return agreed(attempt(function))


def on_first_rank(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, which alone calls it, on every rank; its ValueError, too, so that
    none waits."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return function()
    answer: list[Any] = [None, ""]
    if rank == 0:
        try:
            answer[0] = function()
        except ValueError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]
