"""ONNX files, written by torch's exporter and run by ONNX Runtime.

ONNX Runtime knows operators by name and loads none from a file; a file may however refer to others that hold
its weights, which is why ``read_onnx`` accepts no other name than the one that ``write_onnx`` uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 23
"""The newest that torch's exporter writes."""

_INLINE_BYTES = 1 << 30
"""Weights beyond this go into a file of their own: a protocol buffer ends at 2 GiB."""


def write_onnx(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write ``module`` for images float32[batch, *shape] of any batch; logits float32[batch, classes].

    Args:
        module: the network in evaluation mode, on the CPU, in float32.
        shape: channels, height and width of an image.

    Raises:
        ValueError: packages are missing, or the network cannot be written.
    """
    _require("onnx", "onnxscript")
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (torch.zeros(2, *shape),),
                path,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=size > _INLINE_BYTES,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(module).__name__} cannot be written as ONNX ({reason}); export it as safetensors"
        ) from error


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The network of a file: images float32[batch, C, H, W] on the CPU to logits.

    Raises:
        ValueError: packages are missing, the file is damaged, or it refers to files of others.
    """
    _require("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    try:
        graph = onnx.load(path, load_external_data=False).graph
        _check_references(graph, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings speak of optimisations
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: {reason}; export the network again") from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run


def _check_references(graph: Any, path: Path) -> None:
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    for tensor in _tensors(graph):
        if uses_external_data(tensor) and ExternalDataInfo(tensor).location != f"{path.name}.data":
            raise ValueError(f"{path} refers to weights in another place; export the network again")


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph, of the attributes of its nodes, and of the graphs inside these."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}; run: pip install 'offload-sparse[onnx]'")
