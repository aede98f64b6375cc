"""``torch.export`` programs: the network as a graph of ATen operators, without Python code of the model.

``torch.export.load`` unpickles what an archive asks it to, looks up any name under ``torch``, and evaluates
expressions; ``read_program`` therefore lets it see only archives in which nothing of the kind occurs: tensors
are plain bytes, operators are ATen's, sizes are plain sums and products, and there is no compiled code.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MODEL = "models/model.json"
_SAMPLE = "data/sample_inputs/model.pt"
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|(\.data/)?version"
    rf"|\.data/serialization_id|{re.escape(_MODEL)}|{re.escape(_SAMPLE)}"
    r"|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)"
)
"""Members of an archive that hold no objects."""

_TARGET = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv)")
_EXPRESSION = re.compile(r"(Symbol\('s\d+', positive=True, integer=True\)|s\d+|[-+*/() 0-9])+")
_LOGGERS = ("torch.export", "torch._export")


def write_program(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Export ``module`` for images [batch, *shape] of any batch, and save the program.

    Args:
        module: the network in evaluation mode, on the CPU.
        shape: channels, height and width of an image.

    Raises:
        ValueError: the network cannot be traced for batches of every size.
    """
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
    """The network of a program: images [batch, C, H, W] on the CPU to logits.

    Raises:
        ValueError: the file is damaged, or holds what only a program of another origin needs.
    """
    try:
        _check(path)
        with _quiet():
            program = torch.export.load(path)
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged archive makes torch raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: {reason}; export the network again") from error
    return program.module()


def _check(path: Path) -> None:
    """Refuse an archive that could make ``torch.export.load`` run code."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        odd = [name for name in members if not _PLAIN.fullmatch(name)]
        if odd or len(members) != len(archive.namelist()):
            raise ValueError(f"{path} holds {odd[0] if odd else 'a file twice'}, which no export writes")
        for config in (
            "data/weights/model_weights_config.json",
            "data/constants/model_constants_config.json",
        ):
            entries = json.loads(archive.read(members[config]))["config"].values()
            if any(entry["use_pickle"] for entry in entries):
                raise ValueError(f"{path} holds pickled tensors, which no export writes")
        for key, value in _leaves(json.loads(archive.read(members[_MODEL]))):
            allowed = {"target": _TARGET, "expr_str": _EXPRESSION}.get(key)
            if allowed is not None and not (isinstance(value, str) and allowed.fullmatch(value)):
                raise ValueError(f"{path} calls {value!r}, which no network of this package does")
        sample = archive.read(members[_SAMPLE])
    torch.load(io.BytesIO(sample), weights_only=True)  # else torch would fall back to unpickling it


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every value that a JSON document holds."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs whole tracebacks about archives that it cannot read; the caller tells them in one line."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
