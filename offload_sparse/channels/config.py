"""What is kept or dropped as one."""

from __future__ import annotations

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
            longer runs. The last atom of a width takes the remainder.
    """

    block: int = 1

    def __post_init__(self) -> None:
        require(self.block >= 1, f"atoms.block is {self.block}; give at least 1 channel per atom")
