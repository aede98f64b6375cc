"""Faults on purpose, for tests of what a run survives.

    OFFLOAD_SPARSE_FAULT=kill:rank=1:step=37:phase=scatter

kills rank 1 (as ``kill -9`` would) the first time it reaches that phase at step 37 or later. Several faults
are separated by commas. ``restart=n`` names the attempt that a fault belongs to, counted by the launcher's
restarts; it is 0 unless given, so that a run that is restarted lives. ``hang`` in place of ``kill`` makes the
rank stand still for ever. The rank says so on stderr before. Without the variable nothing happens.

    sample             the masks of a round are about to be drawn
    gather             part of a subnet has been fetched from the store (on the transfer thread, with overlap)
    step               an optimizer step is about to begin
    estimate           a round is over, the keep probabilities have moved
    scatter            part of what a subnet has learned is back in the store (on the transfer thread, too)
    checkpoint-write   a rank is about to write its file
    checkpoint-commit  all files are written; the checkpoint is about to count
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import lru_cache

VARIABLE = "OFFLOAD_SPARSE_FAULT"
PHASES = ("sample", "gather", "step", "estimate", "scatter", "checkpoint-write", "checkpoint-commit")
_EXAMPLE = f"{VARIABLE}=kill:rank=1:step=37:phase=scatter"
_reached = 0  # steps that this process has got to, which a checkpoint's own step may lie behind


@dataclass(frozen=True)
class Fault:
    """One planned fault: which rank, from which step on, in which phase, in which attempt."""

    phase: str
    step: int = 0
    rank: int = 0
    restart: int = 0
    hangs: bool = False


def fault_point(phase: str, step: int) -> None:
    """Die or hang here, in a phase of ``PHASES`` of a run that has done ``step`` optimizer steps, if
    ``OFFLOAD_SPARSE_FAULT`` says so. Raises ValueError: the variable cannot be understood."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    assert phase in PHASES, phase
    global _reached
    _reached = max(_reached, step)
    rank = int(os.environ.get("RANK", "0"))
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for fault in planned_faults(text):
        if (fault.phase, fault.rank, fault.restart) == (phase, rank, restart) and step >= fault.step:
            _suffer(fault)


def _suffer(fault: Fault) -> None:
    what = "hangs" if fault.hangs else "dies"
    line = f"fault: rank {fault.rank} {what} at step {_reached} in {fault.phase} of attempt {fault.restart}\n"
    os.write(2, line.encode())
    os.kill(os.getpid(), signal.SIGSTOP if fault.hangs else signal.SIGKILL)


@lru_cache(maxsize=8)
def planned_faults(text: str) -> tuple[Fault, ...]:
    """The faults that ``text`` describes. Raises ValueError: the text is not a list of faults; shows one that
    is."""
    return tuple(_parse(part) for part in text.split(",") if part)


def _parse(text: str) -> Fault:
    action, *settings = text.split(":")
    pairs = dict(setting.partition("=")[::2] for setting in settings)
    numbers = {key: value for key, value in pairs.items() if key != "phase"}
    known = numbers.keys() <= {"step", "rank", "restart"} and pairs.get("phase") in PHASES
    if (
        action not in ("kill", "hang")
        or not known
        or not all(value.isdecimal() for value in numbers.values())
    ):
        phases = ", ".join(PHASES)
        raise ValueError(f"{VARIABLE} is {text!r}; write it as {_EXAMPLE} (phases: {phases})")
    settled = {key: int(value) for key, value in numbers.items()}
    return Fault(pairs["phase"], **settled, hangs=action == "hang")
