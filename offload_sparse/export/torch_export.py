"""``torch.export`` programs: the network as a graph of ATen operators, without Python code of the model.

Reading an archive runs what it asks for: it is opened only where its origin is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def write_program(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Export ``module`` (in evaluation mode, on the CPU) for images [batch, *shape] of any batch, and save
    the program. Raises ValueError: the network cannot be traced for batches of every size."""
    example = torch.zeros(2, *shape, dtype=next(module.parameters()).dtype)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(module).__name__} cannot be exported as a program ({reason}); export it as safetensors"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    torch.export.save(program, path)


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The network of a program, which is run: images [batch, C, H, W] on the CPU to logits. Raises
    ValueError: the file is damaged."""
    try:
        return torch.export.load(path).module()
    except Exception as error:  # whatever a damaged archive makes torch raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: {reason}; export the network again") from error
