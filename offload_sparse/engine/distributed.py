"""What ranks exchange beside weights: gradients, and the losses that ride behind them in the same buffer.

    flat gradients   | p0 | p1 | p2 | p3 | p4 | p5 | losses |
    buckets          |<-- 2 -->|<-- 1 -->|<-- 0 -->|            backward passes fill them from the right

On a GPU a gradient that is larger than a bucket is sent bucket by bucket, each as soon as its gradients are
there, while the backward pass computes those of earlier layers. Otherwise it goes in one piece behind the
backward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 8 << 20
"""Size of a bucket; a gradient that is larger has one of its own."""


class Reducer:
    """Averages the gradients of a subnet, and the scalars behind them, over the ranks that had a batch.

    Args:
        world_size: number of ranks; with one there is nothing to do.
        tail: scalars behind the gradients.
        live: place among them of the number of ranks that had a batch.
        gradient_sum: place of the sum of the gradients, by which values that are not finite are noticed.
    """

    def __init__(self, world_size: int, tail: int, live: int, gradient_sum: int) -> None:
        self._world_size = world_size
        self._tail, self._live, self._gradient_sum = tail, live, gradient_sum
        self._buckets: dict[int, Buckets] = {}
        self._present: Buckets | None = None
        self._local = False

    def new_round(self, local: bool) -> None:
        """The parameters of the round before are no more. ``local``: in this one every rank goes on with its
        own gradients, and only the scalars are averaged.
        """
        self._buckets.clear()
        self._local = local

    def begin(
        self, side: int, parameters: Callable[[], Sequence[nn.Parameter]], buffer: Tensor, passes: int
    ) -> None:
        """The backward passes of a step, so many, are about to fill ``buffer``: gradients, then scalars.

        Args:
            side: which subnet of the pair.
            parameters: gives its parameters, whose gradients are views of ``buffer``, in the order of that.
            buffer: [gradients + tail].
            passes: backward passes that add to the gradients.
        """
        gradients = buffer[: -self._tail]
        self._present = None
        if self._local or not goes_in_buckets(gradients, self._world_size):
            return
        if side not in self._buckets:
            self._buckets[side] = Buckets(parameters(), gradients)
        self._present = self._buckets[side]
        self._present.begin(passes)

    def finish(self, buffer: Tensor) -> Tensor:
        """Average ``buffer`` over the ranks that had a batch.

        Returns:
            the scalars of this rank, before (with the sum of its gradients, where that was known).
        """
        gradients, tail, buckets = buffer[: -self._tail], buffer[-self._tail :], self._present
        if buckets is None:
            tail[self._gradient_sum] = gradients.sum()
        own = tail.clone()
        if self._world_size == 1:
            return own
        if buckets is not None:
            buckets.send_rest()  # before the scalars, so that the order is the same on every rank
        together = buffer if buckets is None and not self._local else tail
        dist.all_reduce(together)
        live = tail[self._live].clone()
        if buckets is None:
            together.div_(live)
        else:
            tail.div_(live)
            buckets.finish(live)
            tail[self._gradient_sum] = gradients.sum()
        return own


def goes_in_buckets(gradients: Tensor, world_size: int) -> bool:
    """Whether a gradient is sent in buckets: on a GPU, if there is more than one bucket of it."""
    return world_size > 1 and gradients.device.type == "cuda" and gradients.nbytes > BUCKET_BYTES


class Buckets:
    """The gradients of one subnet, sent piece by piece from hooks on its parameters.

    Args:
        parameters: in the order of the buffer, each with a gradient that is a view of it.
        gradients: flat gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], gradients: Tensor) -> None:
        self._parts: list[Tensor] = []
        self._count: list[int] = []
        self._pending: list[dist.Work] = []
        bucket_of = self._divide(parameters, gradients)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
            for parameter, bucket in zip(parameters, bucket_of, strict=True)
            if parameter.requires_grad
        ]
        self.begin(1)

    def begin(self, passes: int) -> None:
        """Expect the gradients of so many backward passes."""
        self._missing = [count * passes for count in self._count]
        self._sent = 0

    def send_rest(self) -> None:
        """Send what has not been sent: gradients that the passes have not reached are zero."""
        while self._sent < len(self._parts):
            self._send()

    def finish(self, live: Tensor) -> None:
        """Wait for all and divide by ``live``, the number of ranks that had a batch."""
        for work in self._pending:
            work.wait()
        self._pending.clear()
        for part in self._parts:
            part.div_(live)

    def _arrived(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        while self._sent < len(self._parts) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        work = dist.all_reduce(self._parts[self._sent], async_op=True)
        assert work is not None
        self._pending.append(work)
        self._sent += 1

    def _divide(self, parameters: Sequence[nn.Parameter], gradients: Tensor) -> list[int]:
        """Cut the buffer from its end into buckets of at least ``BUCKET_BYTES``; each parameter's bucket."""
        end = start = gradients.numel()
        bucket_of: list[int] = []
        count = 0
        for parameter in reversed(parameters):
            start -= parameter.numel()
            bucket_of.append(len(self._parts))
            count += parameter.requires_grad
            if (end - start) * gradients.element_size() >= BUCKET_BYTES:
                self._parts.append(gradients[start:end])
                self._count.append(count)
                end, count = start, 0
        assert start == 0, "the parameters fill the buffer"
        if end > 0:
            self._parts.append(gradients[:end])
            self._count.append(count)
        return bucket_of[::-1]


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


def ranks_where(condition: bool, world_size: int) -> list[int]:
    """The ranks on which ``condition`` holds; every rank has to ask."""
    answers: list[bool] = [condition]
    if world_size > 1:
        answers = [False] * world_size
        dist.all_gather_object(answers, condition)
    return [rank for rank, answer in enumerate(answers) if answer]


def describe_fault(step: int, ranks: list[int], loss: float) -> str:
    """One line about a step with a loss or gradient that is not finite."""
    where = f"rank {', '.join(map(str, ranks))}" if ranks else "a rank"
    return (
        f"the loss or gradient of step {step} is not finite on {where} (mean loss {loss}); lower optim.lr, "
        "set optim.clip_norm, or use train.precision no"
    )


def fingerprint(tensors: list[Tensor]) -> int:
    """A 63-bit digest of the exact bytes of ``tensors``."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def assert_equal_on_ranks(named: dict[str, list[Tensor]], world_size: int, device: torch.device) -> None:
    """Compare digests over all ranks.

    Raises:
        RuntimeError: the ranks hold different values; names what differs.
    """
    if world_size == 1:
        return
    own = torch.tensor([fingerprint(tensors) for tensors in named.values()], dtype=torch.int64, device=device)
    all_ranks = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(all_ranks, own)
    differing = [name for i, name in enumerate(named) if len({int(digests[i]) for digests in all_ranks}) > 1]
    if differing:
        raise RuntimeError(
            f"ranks disagree about {', '.join(differing)}: they no longer train the same network"
        )


def on_first_rank(function: Callable[[], object], rank: int, world_size: int) -> None:
    """Call ``function`` on rank 0 only, and raise its ValueError on every rank, so that none waits."""
    message = [""]
    if rank == 0:
        try:
            function()
        except ValueError as error:
            message = [str(error)]
            if world_size == 1:
                raise
    if world_size > 1:
        dist.broadcast_object_list(message, src=0)
        if message[0]:
            raise ValueError(message[0])
