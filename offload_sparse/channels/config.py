"""What is kept or dropped as one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from offload_sparse.channels.require import require

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
        require(
            re.fullmatch(r"auto|(<=)?[1-9]\d{0,5}", self.block) is not None,
            f"atoms.block is {self.block}; give at least 1 channel per atom, such as 8 or <=8, or auto",
        )


def chosen_block(block: str | int, device: str, bf16: bool = False) -> str | int:
    """``block``, or what ``auto`` is on a device of this type."""
    if block != "auto":
        return block
    return ("<=16" if bf16 else "<=8") if device == "cuda" else 1
