"""One way to open a network, whatever it was exported as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_sparse.channels.require import Explained
from offload_sparse.channels.subnet import meta_copy
from offload_sparse.export.description import DESCRIPTION_FILE, FILES, Preprocessing, read_description
from offload_sparse.export.network_file import STRUCTURE_FILE, load_pruned, read_structure
from offload_sparse.export.onnx import read_onnx
from offload_sparse.export.torch_export import read_program

_SMALL = 3 * 256 * 256


@dataclass(frozen=True)
class Artefact:
    """A network that can be evaluated: images [batch, C, H, W] of ``dtype`` on ``device`` to logits, with the
    preprocessing of its images as far as it is known."""

    network: nn.Module
    preprocessing: Preprocessing
    dtype: torch.dtype
    device: torch.device


class _Function(nn.Module):
    """A network without modules: no training mode, no parameters to be moved."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = (run,)  # a tuple, since a program is a module that refuses ``eval``

    def forward(self, images: Tensor) -> Tensor:
        return self._run[0](images)


def folder_of(path: Path) -> Path:
    """The folder of the network that ``path`` means: a run's ``model/``, whatever was exported beside it and
    is older when the run has gone on, a file's folder, or itself. Raises ValueError: it does not exist, or is
    a run that has not ended."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a run, or of an exported network")
    if path.is_file():
        return path.parent
    inner = path / "model"
    if any((path / name).exists() for name in (STRUCTURE_FILE, DESCRIPTION_FILE)):
        return inner if (inner / STRUCTURE_FILE).exists() else path
    if not inner.is_dir() and (path / "checkpoints").is_dir():
        raise ValueError(f"{path} has not ended yet; give one of the folders in {path / 'checkpoints'}")
    return inner if inner.is_dir() else path


def open_artefact(path: Path, trust: bool = False) -> Artefact:
    """Open a run folder, a folder that ``offload-sparse export`` wrote, or a file in one; a program of
    torch.export, which can run any code, only with ``trust``. Modules go to the CUDA device where there is
    one; programs and ONNX files run on the CPU. Raises ValueError: there is no network, it is damaged, or it
    is a program and not trusted; one line."""
    folder = folder_of(path)
    if not (folder / DESCRIPTION_FILE).is_file():
        preprocessing = read_structure(folder).preprocessing
        network = load_pruned(folder)
        dtype = next((p.dtype for p in network.parameters()), torch.float32)
        _probe(network, preprocessing.shape, dtype, folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Artefact(network.to(device), preprocessing, dtype, device)
    description = read_description(folder)
    file = folder / FILES[description.kind][0]
    if description.kind == "torch_export" and not trust:
        raise ValueError(f"{file} is a program and can run any code; add --trust true if you know its origin")
    run = read_program(file) if description.kind == "torch_export" else read_onnx(file)
    dtype = getattr(torch, description.dtype)
    return Artefact(_Function(run), description.preprocessing, dtype, torch.device("cpu"))


@torch.no_grad()
def _probe(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
    """Refuse a network whose tensors do not fit each other, as those of a file may."""
    with Explained(f"the network in {folder} cannot be run: ", "; export it again"):
        if shape:
            meta_copy(network, other=True)(torch.empty(1, *shape, dtype=dtype, device="meta"))
        if shape and prod(shape) <= _SMALL:  # meta does not look at types
            network(torch.zeros(1, *shape, dtype=dtype))
