"""From a run to the files of others: write, read back, compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from offload_sparse.export import json_values
from offload_sparse.export.description import DESCRIPTION_FILE, FILES, Kind, describe
from offload_sparse.export.hub import write_hub_folder
from offload_sparse.export.network_file import (
    STRUCTURE_FILE,
    Structure,
    copy_network,
    load_pruned,
    read_structure,
)
from offload_sparse.export.onnx import write_onnx
from offload_sparse.export.open import folder_of, open_artefact
from offload_sparse.export.read_back import compare
from offload_sparse.export.torch_export import write_program
from offload_sparse.store.files import sync

Format = Literal["safetensors", "torch_export", "onnx", "hub"]

_BATCHES = (1, 3)


def export_network(path: Path, format: Format, output: Path | None = None) -> dict[str, Any]:
    """Write the network of a run (or of a network's folder) in another format, to ``output`` or
    ``export/<format>`` in the folder of the run; read it in a fresh process and compare the logits of random
    images. Returns where it is, its bytes, and the largest relative difference of logits over batches of 1
    and 3 images (None where the shape of the images is not known). Raises ValueError: there is no network, it
    cannot be written in this format, or what was read back differs."""
    source = folder_of(path)
    structure = read_structure(source)
    run_dir = source.parent if source.name == "model" else source
    target = output or run_dir / "export" / format
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the folder that is read; give another one with --output")
    network = load_pruned(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION_FILE, *FILES["torch_export"], *FILES["onnx"]):
        (target / name).unlink(missing_ok=True)
    try:
        if format == "safetensors":
            copy_network(source, target)
        elif format == "hub":
            write_hub_folder(source, target, _summary(run_dir))
        else:
            network = _write_graph(network, structure, format, target)
    finally:
        if not any(target.iterdir()):
            target.rmdir()
    size = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    try:
        error = _difference(network, target, structure.preprocessing.shape)
    except ValueError:
        for name in (DESCRIPTION_FILE, STRUCTURE_FILE):  # nobody shall read it
            (target / name).unlink(missing_ok=True)
        raise
    return {"format": format, "folder": str(target), "bytes": size, "largest_difference": error}


def _write_graph(network: nn.Module, structure: Structure, kind: Kind, target: Path) -> nn.Module:
    """A program or an ONNX file, with its description; the network as it was written."""
    shape = structure.preprocessing.shape
    if not shape:
        raise ValueError(
            "the network does not say the shape of its images; "
            "save it with preprocessing={'shape': [channels, height, width]}"
        )
    network = network.float() if kind == "onnx" else network  # ONNX Runtime has no float64 convolutions
    write = write_onnx if kind == "onnx" else write_program
    write(network, shape, target / FILES[kind][0])
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    sync(target)
    describe(target, kind, structure.model, structure.preprocessing, dtype)
    return network


def _difference(network: nn.Module, target: Path, shape: tuple[int, ...]) -> float | None:
    if not shape:
        return None
    dtype = next(network.parameters()).dtype
    batches = [torch.empty(batch, *shape, dtype=dtype, device="meta") for batch in _BATCHES]
    return max(compare(partial(_opened, target), network, (images,), target) for images in batches)


def _opened(folder: Path) -> nn.Module:
    return open_artefact(folder, trust=True).network


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        return json_values.read(run_dir / "summary.json", dict[str, Any])
    except (OSError, ValueError):
        return {}
