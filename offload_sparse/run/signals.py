"""Being asked to stop: SIGTERM or SIGUSR1 from a scheduler, Ctrl-C from a user; and the ranks' agreement."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from offload_sparse.run.launch import own_group

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

GRACE = 3.0
"""Seconds in which a further signal is the first one again: a terminal and a scheduler signal the launcher,
too, which passes it on."""


class Interruption:
    """While entered, the first signal is only noted (its name, else ""); one that comes later ends the
    process as usual."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, Any] = {}
        self._noted = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.signal_name:
            self.signal_name, self._noted = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._noted > GRACE:
            self._restore()
            signal.raise_signal(number)  # in this thread, now

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Agreement:
    """What any rank wants, every rank does, at the same step.

    On several ranks the wishes of a step are exchanged while the next step runs, so that nobody waits: the
    answer is that of the step before."""

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
