"""Being asked to stop: SIGTERM from a scheduler, Ctrl-C from a user; and the ranks' agreement about it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from offload_sparse.training.launch_environment import own_group


class Interruption:
    """While entered, the first SIGTERM or SIGINT is only noted; a second one ends the process as usual.

    Attributes:
        signal_name: the signal that came, or "".
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Agreement:
    """What any rank wants, every rank does, at the same step.

    On several ranks the wishes of a step are exchanged while the next step runs, so that nobody waits: the
    answer is that of the step before.
    """

    def __init__(self) -> None:
        self._group = own_group()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether some rank has it (had it at the last call, on several ranks)."""
        if self._group is None:
            return wishes
        answer = self.drain()
        flags = torch.tensor(wishes, dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, flags)
        return answer or (False,) * len(wishes)

    def drain(self) -> tuple[bool, ...]:
        """Wait for the exchange that is under way, and return its answer."""
        if self._pending is None:
            return ()
        work, flags = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(flag) for flag in flags)
