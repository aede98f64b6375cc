"""From where backward passes leave gradients into one flat buffer, and from there to the other ranks.

    parameters       p0.grad p1.grad p2.grad p3.grad p4.grad p5.grad   made by autograd, freed when copied
                        |       |       |       |       |       |      one copy per bucket
    flat gradients   |  p0   |  p1   |  p2   |  p3   |  p4   |  p5   | losses |
    buckets          |<----- 2 ----->|<- 1 ->|<--------- 0 --------->|   filled from the right

Gradients that are larger than a bucket are copied bucket by bucket, each as soon as it is whole, so that
little of them is in memory twice. On a GPU that shares them with other ranks each bucket is also sent at
once, while the backward pass computes those of earlier layers. Otherwise they go in one piece behind the
backward pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload_sparse.channels.selection import Layout
from offload_sparse.engine.losses import GRADIENT_SUM, LIVE, TAIL

BUCKET_BYTES = 64 << 20
"""Size of a bucket; a gradient that is larger has one of its own."""

SENT_BYTES = 8 << 20
"""Of one that is sent as soon as it is whole."""


class FlatGradients:
    """The gradients of one subnet.

    Args:
        parameters: all, in the order of the buffer.
        buffer: [gradients + TAIL], whatever it holds.
        layout: where each is in the buffer, if they do not lie one after the other.
        zeros: as many as may lie between two of them, for what lies there.

    Attributes:
        flat, tail: the gradients; the ``TAIL`` scalars behind them.
        sent: what is to be summed over ranks: the buffer. Beside gradients of fewer than 32 bits, which would
            round losses and counts, the tail is float32, with memory of its own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buffer: Tensor,
        layout: Layout | None = None,
        zeros: Tensor | None = None,
    ) -> None:
        self.flat, self.tail, self.sent = buffer[:-TAIL], buffer[-TAIL:], [buffer]
        if buffer.dtype.itemsize < 4:
            self.tail = buffer.new_zeros(TAIL, dtype=torch.float32)
            self.sent = [self.tail, self.flat]
        self._parameters = list(parameters)
        if layout is None:
            layout = Layout.of({str(n): tuple(p.shape) for n, p in enumerate(parameters)})
        self._starts = list(layout.offsets.values())
        self._places = layout.views(self.flat)
        # By the number of the parameter before it; zeros are copied there, so that it is no operation more.
        self._gaps = {
            bisect_left(self._starts, end) - 1: (self.flat[end : end + size], zeros[:size])
            for end, size in layout.gaps
            if zeros is not None
        }
        self._scalars = list(self.tail.unbind())
        self._buckets: list[_Bucket] = []
        self._sends = False
        self._whole = 0

    def begin(self, passes: int, sends: bool = False) -> None:
        """So many backward passes are about to make the gradients; what there was is dropped. With ``sends``,
        the same in all steps, each bucket is sent once it is whole."""
        if not self._buckets:
            self._buckets, self._sends = self._cut(SENT_BYTES if sends else BUCKET_BYTES), sends
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.missing = bucket.trained * passes
        self._whole = 0

    @property
    def empty(self) -> bool:
        """Whether no backward pass has left anything since the step began."""
        return self._whole == 0 and all(parameter.grad is None for parameter in self._parameters)

    @torch.no_grad()
    def hold(self) -> None:
        """Before the next of several passes: what those before have left goes to its place, where that pass
        adds to it. A CUDA graph would write its own gradients over it."""
        places, gradients = list[Tensor](), list[Tensor]()
        for number in (number for bucket in self._buckets[self._whole :] for number in bucket.numbers):
            parameter, place = self._parameters[number], self._places[number]
            gradient = parameter.grad
            if gradient is not None and gradient is not place and gradient.layout == torch.strided:
                places.append(place)
                gradients.append(gradient)
                parameter.grad = place
        if places:
            torch._foreach_copy_(places, gradients)

    def end(self, scalars: Sequence[Tensor]) -> None:
        """All passes are done: what is left of the gradients is copied, with ``scalars`` to the tail. What no
        pass has reached is zero. Raises ValueError: a pass has added to a gradient that was sent already."""
        late = [number for bucket in self._buckets[: self._whole] for number in bucket.numbers]
        if late := [number for number in late if self._parameters[number].grad is not None]:
            self._add(late)
        rest = [number for bucket in self._buckets[self._whole :] for number in bucket.numbers]
        places = self._scalars[: len(scalars)]
        if len(self.sent) == 1:
            self._copy(rest, places, scalars)
        else:  # two types in one call would be copied one by one
            self._copy(rest)
            torch._foreach_copy_(places, list(scalars))
        while self._whole < len(self._buckets):
            self._send()

    def divide(self, count: Tensor) -> None:
        """Wait for the buckets that were sent, and divide all gradients by ``count``."""
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        self.flat.div_(count)

    def _arrived(self, bucket: _Bucket) -> None:
        bucket.missing -= 1
        while self._whole < len(self._buckets) and self._buckets[self._whole].missing == 0:
            self._copy(self._buckets[self._whole].numbers)
            self._send()

    @torch.no_grad()
    def _copy(
        self, numbers: Sequence[int], places: Sequence[Tensor] = (), values: Sequence[Tensor] = ()
    ) -> None:
        """Gradients of the parameters of these ``numbers`` to their places, with ``values`` to ``places``."""
        targets, sources = list(places), list(values)
        absent: list[Tensor] = []
        for number in numbers:
            gradient, place = self._parameters[number].grad, self._places[number]
            self._parameters[number].grad = None
            if gradient is None:
                absent.append(place)
            elif gradient is not place:
                targets.append(place)
                sources.append(gradient if gradient.layout == torch.strided else gradient.to_dense())
            if number in self._gaps:
                targets.append(self._gaps[number][0])
                sources.append(self._gaps[number][1])
        if absent:
            torch._foreach_zero_(absent)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _add(self, late: Sequence[int]) -> None:
        """Gradients that came twice in a pass, as with reentrant checkpoints, and were copied too early."""
        if self._sends:
            raise ValueError(
                "a backward pass gives a parameter its gradient in several parts; use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        for number in late:
            gradient = self._parameters[number].grad
            assert gradient is not None
            self._places[number].add_(gradient)
            self._parameters[number].grad = None

    def _send(self) -> None:
        bucket = self._buckets[self._whole]
        self._whole += 1
        if self._sends:
            bucket.work = dist.all_reduce(bucket.part, async_op=True)

    def _cut(self, size: int) -> list[_Bucket]:
        """Cut the gradients from their end into buckets of at least ``size`` bytes; hooks on the parameters
        of several buckets.
        """
        end = self.flat.numel()
        buckets: list[_Bucket] = []
        numbers: list[int] = []
        for number in reversed(range(len(self._parameters))):
            numbers.append(number)
            start = self._starts[number]
            if number == 0 or (end - start) * self.flat.element_size() >= size:
                trained = sum(self._parameters[n].requires_grad for n in numbers)
                buckets.append(_Bucket(self.flat[start:end], numbers, trained))
                end, numbers = start, []
        assert end == 0, "the parameters fill the buffer"
        for bucket in buckets if len(buckets) > 1 else ():
            for number in bucket.numbers:
                parameter = self._parameters[number]
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, bucket=bucket: self._arrived(bucket)
                    )
        return buckets


@dataclass(eq=False)
class _Bucket:
    """A run of the flat gradients: its part of these, the numbers of its parameters, and how many of them are
    trained; the gradients that are missing; what is on its way to other ranks.
    """

    part: Tensor
    numbers: list[int]
    trained: int
    missing: int = field(default=0)
    work: dist.Work | None = None


class Reducer:
    """Averages the gradients of a subnet, and the scalars behind them, which have the type and device of
    ``like``, over the ranks that had a batch."""

    def __init__(self, world_size: int, like: Tensor) -> None:
        self._world_size = world_size
        self._zero, self._one = like.new_zeros(()), like.new_ones(())
        self._present: FlatGradients
        self._sends, self._local = False, False

    def begin(self, gradients: FlatGradients, passes: int, local: bool) -> None:
        """The backward passes of a step, so many, are about to make ``gradients``. ``local``: every rank goes
        on with its own; only scalars are averaged."""
        self._present, self._local = gradients, local
        self._sends = not local and goes_in_buckets(gradients.flat, self._world_size)
        gradients.begin(passes, self._sends)

    def finish(self, measured: Mapping[int, Tensor], live: bool) -> tuple[Tensor, Tensor]:
        """Average gradients and scalars (those of this rank by place in ``measured``) over the ranks that had
        a batch (``live``); NaN if none had. Returns float[TAIL] each: scalars averaged, and those of this
        rank (with the sum of its gradients, where that was known); copies."""
        gradients, tail = self._present, self._present.tail
        scalars = [measured.get(place, self._zero) for place in range(TAIL)]
        scalars[LIVE] = self._one if live else self._zero
        gradients.end(scalars)
        if not self._sends:
            torch.sum(gradients.flat, 0, dtype=tail.dtype, out=tail[GRADIENT_SUM])
        own = tail.clone()
        if self._world_size == 1:
            return own, own
        for part in [tail] if self._sends or self._local else gradients.sent:
            dist.all_reduce(part)
        averaged = tail / tail[LIVE]
        if not self._local:
            gradients.divide(tail[LIVE])
        if self._sends:
            torch.sum(gradients.flat, 0, dtype=tail.dtype, out=averaged[GRADIENT_SUM])
        return averaged, own


def goes_in_buckets(gradients: Tensor, world_size: int) -> bool:
    """Whether gradients are sent in buckets: on a GPU, if there is more than one bucket of them."""
    return world_size > 1 and gradients.device.type == "cuda" and gradients.nbytes > SENT_BYTES
