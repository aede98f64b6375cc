"""``offload-sparse export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload_sparse.cli.table import show
from offload_sparse.config.parse import PROGRAM, Options


@dataclass
class ExportConfig:
    """Write the network of a run for other programs, read it back and compare.

    Attributes:
        path: run folder, or the folder ``model/`` of a run.
        format: ``safetensors`` writes tensors and structure.json; ``torch_export`` a program of torch.export
            (model.pt2); ``onnx`` a file for ONNX Runtime and others (model.onnx); ``hub`` a folder with a
            model card for the Hugging Face Hub, which is not uploaded.
        output: folder to write to; empty takes ``export/<format>`` in the folder of the run.
        json: print one JSON object instead of a table.
    """

    path: Path
    format: Literal["safetensors", "torch_export", "onnx", "hub"] = "safetensors"
    output: str = ""
    json: bool = False


_OPTIONS = Options(
    ExportConfig,
    f"{PROGRAM} export",
    (
        f"{PROGRAM} export runs/quickstart --format onnx",
        f"{PROGRAM} export runs/quickstart --format hub --output to_upload",
    ),
    positional=("path",),
)


def export(argv: Sequence[str]) -> int:
    """Write the network of a run as safetensors, torch.export program, ONNX, or a folder for the Hub."""
    config = _OPTIONS.parse(argv)
    from offload_sparse.export.convert import export_network

    output = Path(config.output).expanduser() if config.output else None
    show(export_network(config.path, config.format, output), config.json)
    return 0
