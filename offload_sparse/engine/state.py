"""What a method hands out to be saved, and takes back to carry on: the state between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

IN_PLACE = "steps_in_place"
"""In the meta of a method whose own files hold its state: the optimizer steps that they have seen."""


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a tensor that is spread over the ranks by its first dimension.

    Attributes:
        own: [rows, ...] on the CPU, contiguous; a view of the store where there is one. A scalar is [] on the
            rank that owns it; a rank that owns nothing has zero rows.
        global_shape: shape of the whole tensor.
        first_row: the row of the whole tensor that ``own`` begins with.
    """

    own: Tensor
    global_shape: tuple[int, ...]
    first_row: int = 0


@dataclass
class MethodState:
    """Everything that the rest of a run depends on, beside its configuration and its position.

    Attributes:
        sharded: rows that each rank owns. They may be read until the method's ``while_saving`` callback has
            returned; a checkpoint is read into the ``own`` tensors of a fresh state.
        replicated: tensors that are equal on every rank (copies); rank 0 writes them.
        local: tensors of this rank alone (copies); given back only on as many ranks as wrote them.
        meta: JSON values, equal on every rank.
    """

    sharded: dict[str, Shard] = field(default_factory=dict)
    replicated: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
