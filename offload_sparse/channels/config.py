"""What is kept or dropped as one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Residual = Literal["coupled", "internal", "filter"]
"""What is sampled on residual streams, see ``ModelConfig``."""


@dataclass
class AtomsConfig:
    """What is kept or dropped as one.

    Attributes:
        block: channels per atom; 8 or 16 keep widths at multiples that matrix units like, and move rows in
            longer runs. The last atom of a width takes the remainder. ``<=8`` makes shorter runs of it in
            widths of which fewer than eight atoms would be left. ``auto`` is 1 on a CPU and ``<=8`` on a CUDA
            device, ``<=16`` with ``train.precision bf16``.
    """

    block: str | int = "auto"

    def __post_init__(self) -> None:
        self.block = str(self.block)
        if self.block != "auto":
            channels_per_atom(self.block)


def channels_per_atom(block: str | int) -> tuple[int, bool]:
    """The number in ``block``, and whether it is the largest (``<=8``). Raises ValueError: it is neither."""
    found = re.fullmatch(r"(<=)?([1-9]\d{0,5})", str(block))
    if found is None:
        raise ValueError(
            f"atoms.block is {block}; give at least 1 channel per atom, such as 8 or <=8, or auto"
        )
    return int(found[2]), found[1] is not None


def chosen_block(block: str | int, device: str, bf16: bool = False) -> str | int:
    """``block``, or what ``auto`` is on a device of this type."""
    if block != "auto":
        return block
    return ("<=16" if bf16 else "<=8") if device == "cuda" else 1
