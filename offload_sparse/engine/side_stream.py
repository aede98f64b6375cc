"""One background thread whose device work runs on a CUDA stream of its own.

On a CPU device it is just the thread. The CUDA branch has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class SideStream:
    """Runs work in order, each piece behind what the caller's stream had been given when it was submitted.

    Args:
        device: where the work computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._worker = ThreadPoolExecutor(1, "transfer")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` in the background."""
        if self._stream is None:
            return self._worker.submit(work)
        ready = torch.cuda.current_stream(self._stream.device).record_event()
        return self._worker.submit(self._on_stream, ready, work)

    def wait(self, pending: Future[None]) -> None:
        """Wait for the thread, make the caller's stream wait for the device; raises what the work raised."""
        pending.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def close(self) -> None:
        """Let the work end and the thread with it."""
        self._worker.shutdown(wait=True)

    def _on_stream(self, ready: torch.cuda.Event, work: Callable[[], None]) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
