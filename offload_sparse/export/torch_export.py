"""``torch.export`` programs: the network as a graph of ATen operators, without Python code of the model.

Reading an archive runs what it asks for: it is opened only where its origin is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_sparse.channels.require import Explained

READING = ("torch.export._trace",)
"""Imported to read a program, which takes seconds."""


def write_program(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Export ``module`` (in evaluation mode, on the CPU) for images [batch, *shape] of any batch, and save
    the program. Raises ValueError: the network cannot be traced for batches of every size."""
    example = torch.zeros(2, *shape, dtype=next(module.parameters()).dtype)
    name = type(module).__name__
    with Explained(f"{name} cannot be exported as a program (", "); export it as safetensors"):
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    torch.export.save(program, path)


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The network of a program, which is run: images [batch, C, H, W] on the CPU to logits. Raises
    ValueError: the file is damaged."""
    with Explained(f"{path} is damaged: ", "; export the network again"):
        return torch.export.load(path).module()
