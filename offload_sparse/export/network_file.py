"""The final network on disk: written, and read back.

model/
  weights.safetensors   the narrow tensors; one with many zeros as its values and where they are
  structure.json        how to build the module, the shape of every tensor, the kept channels of every group,
                        the positions of the operands in every sum whose operands hold different channels
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.stream_add import StreamAdd, additions, expose_additions
from offload_sparse.channels.subnet import fit_attributes, set_tensor
from offload_sparse.export.description import ExportLayout
from offload_sparse.export.sparse_tensors import decode, encode

FORMAT = 1
WEIGHTS_FILE = "weights.safetensors"
STRUCTURE_FILE = "structure.json"
_DIGEST, _WEIGHTS_DIGEST = "digest", "weights_digest"  # which an export written by hand may leave out


@dataclass(frozen=True)
class FinalNetwork:
    """A network that training ends with.

    Attributes:
        module: an ordinary module with memory of its own.
        mask: bool[C], the atoms that it keeps of the full network.
        channel_map: the map of the full network.
    """

    module: nn.Module
    mask: Tensor
    channel_map: ChannelMap

    def kept_channels(self) -> dict[str, dict[str, Any]]:
        """Per group the channels of the layer that it is named after, and which of them are kept."""
        kept_or_always = torch.cat([self.mask, torch.ones(1, dtype=torch.bool)])  # -1 means always
        kept = {}
        for group in self.channel_map.groups:
            channels = self.channel_map.channels_of(group)
            positions = kept_or_always[channels].nonzero().flatten().tolist()
            kept[group.name] = {"size": len(channels), "kept": positions}
        return kept

    def save(
        self,
        path: str | os.PathLike[str],
        model: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        layout: ExportLayout = "auto",
    ) -> None:
        """Write ``weights.safetensors`` and ``structure.json``, each complete or not at all.

        Args:
            path: a folder, created when missing.
            model: how the full network is built: ``name`` and ``arguments`` of
                ``offload_sparse.workloads.models.build_model``; None when ``load_pruned`` will be given the
                model.
            preprocessing: what an input image goes through (mean, std, shape), for the reader.
            layout: how tensors are written; see ``export.sparse_tensors``.
        """
        # Safetensors refuses views of one storage, and a module may have been extracted as such.
        state = self.module.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        structure: dict[str, Any] = {
            "format": FORMAT,
            "model": model or {},
            "preprocessing": preprocessing or {},
            "groups": self.kept_channels(),
            "additions": {name: _held(add) for name, add in additions(self.module) if add.width},
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        _write(Path(path), tensors, structure, layout)


def copy_network(source: Path, target: Path) -> None:
    """Write an exported network once more, with every tensor whole, whatever its layout was.

    Raises:
        ValueError: a file is missing or damaged, or the files do not belong together.
    """
    structure, tensors = _read(source)
    own = {key: structure[key] for key in structure if key not in ("layouts", _DIGEST, _WEIGHTS_DIGEST)}
    _write(target, tensors, own, "dense")


def _write(folder: Path, tensors: dict[str, Tensor], structure: dict[str, Any], layout: ExportLayout) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, layouts = encode(tensors, layout)
    if layouts:
        structure["layouts"] = layouts
    temporary = folder / (WEIGHTS_FILE + ".tmp")
    save_file(tensors, temporary)
    structure[_WEIGHTS_DIGEST] = _file_digest(temporary)
    structure[_DIGEST] = _digest(structure)
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary = folder / (STRUCTURE_FILE + ".tmp")
    temporary.write_text(json.dumps(structure, indent=1), encoding="utf-8")
    os.replace(temporary, folder / STRUCTURE_FILE)


def read_structure(folder: Path) -> dict[str, Any]:
    """The checked contents of ``structure.json``.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / STRUCTURE_FILE
    try:
        structure = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {STRUCTURE_FILE}; give the folder `model/` of a finished run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # of UTF-8 and JSON, too
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise ValueError(f"{path} is not an exported network of format {FORMAT}; export it again")
    signed = _DIGEST in structure or _WEIGHTS_DIGEST in structure
    if signed and structure.get(_DIGEST) != _digest(structure):
        raise ValueError(f"{path} is damaged: its digest does not fit; export it again")
    for key in ("model", "groups", "tensors", "preprocessing"):
        if not isinstance(structure.get(key), dict):
            raise ValueError(f"{path} lacks {key!r}; export it again")
    return structure


def load_pruned(path: str | os.PathLike[str], model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read an exported network.

    Args:
        path: folder with ``weights.safetensors`` and ``structure.json``.
        model: builds the full network, for a model that the package cannot build by name.

    Returns:
        the narrow network in evaluation mode, on the CPU.

    Raises:
        ValueError: a file is missing or damaged, or the files do not belong together.
    """
    folder = Path(path)
    structure, tensors = _read(folder)
    module = _empty_model(structure["model"], model)
    _restore_additions(module, structure.get("additions", {}), folder)
    own = dict(module.state_dict())
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(
            f"{folder}: the network has no place for, or lacks, {odd[0]!r}; was it another model?"
        )
    for name, tensor in tensors.items():
        if own[name].dim() != tensor.dim():
            raise ValueError(
                f"{folder}: {name!r} has {tensor.dim()} dimensions, the network {own[name].dim()}"
            )
        set_tensor(module, name, tensor)
    fit_attributes(module)
    return module.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure, and every tensor as it is declared there."""
    structure = read_structure(folder)
    tensors = _decoded(_read_weights(folder / WEIGHTS_FILE), structure, folder)
    if structure.get(_WEIGHTS_DIGEST, "") not in ("", _file_digest(folder / WEIGHTS_FILE)):
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: its digest does not fit; export it again")
    declared = {name: list(shape) for name, shape in structure["tensors"].items()}
    found = {name: list(t.shape) for name, t in tensors.items()}
    if declared != found:
        odd = sorted(name for name in declared.keys() | found.keys() if declared.get(name) != found.get(name))
        raise ValueError(
            f"{folder}: {WEIGHTS_FILE} and {STRUCTURE_FILE} disagree about {odd[0]!r}; export it again"
        )
    return structure, tensors


def _digest(structure: dict[str, Any]) -> str:
    body = {key: value for key, value in structure.items() if key != _DIGEST}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _held(add: StreamAdd) -> dict[str, Any]:
    """Width of a sum, and the positions in it of the channels of each operand."""
    return {"width": add.width, "left": add.left_index.tolist(), "right": add.right_index.tolist()}


def _restore_additions(module: nn.Module, held: dict[str, Any], folder: Path) -> None:
    try:
        expose_additions(module, held)
        for name, add in additions(module):
            width = int(held[name]["width"])
            sides = torch.zeros(2, width, dtype=torch.bool)
            for side, key in zip(sides, ("left", "right"), strict=True):
                side[held[name][key]] = True
            add.hold(sides[0], sides[1], torch.device("cpu"))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: {STRUCTURE_FILE} does not fit the additions of this model ({error}); export it again"
        ) from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the folder `model/` of a finished run") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; export it again") from None


def _decoded(stored: dict[str, Tensor], structure: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    try:
        return decode(stored, structure.get("layouts", {}), structure["tensors"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; export it again") from None


def _empty_model(spec: dict[str, Any], model: Callable[[], nn.Module] | None) -> nn.Module:
    if model is not None:
        with torch.device("meta"):
            return model()
    from offload_sparse.workloads.models import build_model

    name, arguments = spec.get("name"), spec.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(
            f"{STRUCTURE_FILE} names no model; pass `model`, a function that builds the full network"
        )
    with torch.device("meta"):
        return build_model(name, **arguments)
