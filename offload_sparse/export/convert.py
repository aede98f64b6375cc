"""From a run to the files of others: write, read back, compare."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from offload_sparse.export import json_values
from offload_sparse.export.description import DESCRIPTION_FILE, FILES, Description, Kind, describe
from offload_sparse.export.hub import CARD_FILE, is_card, write_hub_folder
from offload_sparse.export.network_file import (
    STRUCTURE_FILE,
    WEIGHTS_FILE,
    Structure,
    copy_network,
    load_pruned,
    read_structure,
)
from offload_sparse.export.onnx import write_onnx
from offload_sparse.export.open import folder_of, open_artefact
from offload_sparse.export.read_back import compare
from offload_sparse.export.torch_export import READING, write_program
from offload_sparse.store.files import TEMPORARY, sync, sync_folder

Format = Literal["safetensors", "torch_export", "onnx", "hub"]

_WRITTEN: dict[Format, tuple[str, ...]] = {
    "safetensors": (WEIGHTS_FILE, STRUCTURE_FILE),
    "hub": (WEIGHTS_FILE, STRUCTURE_FILE, CARD_FILE),
    "torch_export": (*FILES["torch_export"], DESCRIPTION_FILE),
    "onnx": (*FILES["onnx"], DESCRIPTION_FILE),
}
"""The files of an export, in the order in which they take the places of an earlier one's: what describes the
others comes after them."""

_BATCHES = (1, 3)


def export_network(path: Path, format: Format, output: Path | None = None) -> dict[str, Any]:
    """Write the network of a run (or of a network's folder) in another format, to ``output`` or
    ``export/<format>`` in the folder of the run; read it in a fresh process and compare the logits of random
    images. Only then it takes the place of an earlier export in that folder, whose other files stay. Returns
    where it is, its bytes, and the largest relative difference of logits over batches of 1 and 3 images (None
    where the shape of the images is not known). Raises ValueError: there is no network, it cannot be written
    in this format, what was read back differs, or a file is in the way that no export has written."""
    source = folder_of(path)
    structure = read_structure(source)
    run_dir = source.parent if source.name == "model" else source
    target = output or run_dir / "export" / format
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the folder that is read; give another one with --output")
    earlier, is_new = _earlier_export(target), not target.exists()
    for name in (DESCRIPTION_FILE, *_WRITTEN[format]):
        if os.path.lexists(target / name) and name not in earlier:
            raise ValueError(
                f"{target / name} is of no export that can be replaced; move it, or give another folder with "
                "--output"
            )
    network = load_pruned(source)
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(TEMPORARY, "export", target) as folder:
            part = Path(folder)
            if format == "safetensors":
                copy_network(source, part)
            elif format == "hub":
                write_hub_folder(source, part, _summary(run_dir))
            else:
                network = _write_graph(network, structure, format, part)
            size = sum(file.stat().st_size for file in part.iterdir())
            error = _difference(network, part, structure.preprocessing.shape, target)
            written = [name for name in _WRITTEN[format] if (part / name).exists()]
            for name in written:
                os.replace(part / name, target / name)
    except BaseException:
        if is_new:
            with suppress(OSError):  # where a part of it has been moved
                target.rmdir()
        raise
    for name in earlier.difference(written):
        (target / name).unlink(missing_ok=True)
    sync_folder(target)
    return {"format": format, "folder": str(target), "bytes": size, "largest_difference": error}


def _earlier_export(folder: Path) -> set[str]:
    """The files that an export has left in a folder, as what describes them says."""
    names = {CARD_FILE} if is_card(folder / CARD_FILE) else set()
    with suppress(OSError, ValueError):
        names |= {DESCRIPTION_FILE, *json_values.read(folder / DESCRIPTION_FILE, Description).files}
    with suppress(OSError, ValueError):
        read_structure(folder)
        names |= {STRUCTURE_FILE, WEIGHTS_FILE}
    return names


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


def _difference(network: nn.Module, part: Path, shape: tuple[int, ...], target: Path) -> float | None:
    if not shape:
        return None
    dtype = next(network.parameters()).dtype
    batches = [(torch.empty(batch, *shape, dtype=dtype, device="meta"),) for batch in _BATCHES]
    needs = READING if (part / FILES["torch_export"][0]).exists() else ()
    return compare(partial(_opened, part), network, batches, target, needs)


def _opened(folder: Path) -> nn.Module:
    return open_artefact(folder, trust=True).network


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        return json_values.read(run_dir / "summary.json", dict[str, Any])
    except (OSError, ValueError):
        return {}
