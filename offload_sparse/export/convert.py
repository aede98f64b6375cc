"""From a run to the files of others: write, read back, compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offload_sparse.export.description import DESCRIPTION_FILE, FILES, Kind, describe
from offload_sparse.export.hub import write_hub_folder
from offload_sparse.export.network_file import copy_network, load_pruned, read_structure
from offload_sparse.export.onnx import write_onnx
from offload_sparse.export.open import folder_of, open_artefact
from offload_sparse.export.torch_export import write_program

Format = Literal["safetensors", "torch_export", "onnx", "hub"]

TOLERANCE = 1e-4
"""Largest difference of logits between the network and what was read back, relative to the largest logit."""

_BATCHES = (1, 3)


def export_network(path: Path, format: Format, output: Path | None = None) -> dict[str, Any]:
    """Write the network of a run in another format, read it back and compare the logits of random images.

    Args:
        path: run folder, or folder of its network.
        format: what to write.
        output: folder to write to; ``export/<format>`` in the folder of the run when None.

    Returns:
        where it is, its bytes, and the largest relative difference of logits over batches of 1 and 3 images
        (None where the shape of the images is not known).

    Raises:
        ValueError: there is no network, it cannot be written in this format, or what was read back differs.
    """
    source = folder_of(path)
    structure = read_structure(source)
    run_dir = source.parent if source.name == "model" else source
    target = output or run_dir / "export" / format
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the folder that is read; give another one with --output")
    target.mkdir(parents=True, exist_ok=True)
    shape = tuple(int(n) for n in structure["preprocessing"].get("shape", ()))
    if format == "safetensors":
        copy_network(source, target)
    elif format == "hub":
        write_hub_folder(source, target, _summary(run_dir))
    else:
        _write_graph(source, structure, shape, format, target)
    error = _difference(source, target, shape) if shape else None
    if error is not None and not error <= TOLERANCE:  # NaN fails too
        raise ValueError(f"what was read back from {target} differs by {error:.1e}; do not use it")
    size = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    return {"format": format, "folder": str(target), "bytes": size, "largest_difference": error}


def _write_graph(
    source: Path, structure: dict[str, Any], shape: tuple[int, ...], kind: Kind, target: Path
) -> None:
    """A program or an ONNX file, with its description."""
    if not shape:
        raise ValueError(
            f"{source} does not say the shape of its images; "
            "write it with preprocessing={'shape': [channels, height, width]}"
        )
    network = load_pruned(source)
    for name in (DESCRIPTION_FILE, *FILES[kind]):
        (target / name).unlink(missing_ok=True)
    file = target / FILES[kind][0]
    if kind == "onnx":
        network = network.float()  # ONNX Runtime has no float64 convolutions
        write_onnx(network, shape, file)
    else:
        write_program(network, shape, file)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    describe(target, kind, structure["model"], structure["preprocessing"], dtype)


def _difference(source: Path, target: Path, shape: tuple[int, ...]) -> float:
    """Largest difference of logits, relative to the largest logit."""
    network, other = load_pruned(source), open_artefact(target)
    dtype = next(network.parameters()).dtype
    worst = 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, *shape, dtype=dtype, generator=torch.Generator().manual_seed(batch))
        expected = _logits(network, images)
        found = _logits(other.network, images.to(other.device, other.dtype)).to(expected)
        worst = max(
            worst,
            float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)),
            key=_nan_last,
        )
    return worst


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
