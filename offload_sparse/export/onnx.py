"""ONNX files, written by torch's exporter and run by ONNX Runtime.

ONNX Runtime knows operators by name and loads none from a file, so that reading one runs no code. A file may
refer to others that hold its weights, loop, or make tensors of any size: ``read_onnx`` accepts no other name
than the one that ``write_onnx`` uses, no loops, and bounds the memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.require import Explained

OPSET = 23
"""The newest that torch's exporter writes."""

_INLINE_BYTES = 1 << 30
"""Weights beyond this go into a file of their own: a protocol buffer ends at 2 GiB."""

MAX_BYTES = 8 << 30
"""Of the tensors of a network that is run; ONNX Runtime takes no more."""

_UNBOUNDED = ("If", "Loop", "Scan", "SequenceMap")


def write_onnx(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write ``module`` (in evaluation mode, on the CPU, in float32) for images float32[batch, *shape] of any
    batch; logits float32[batch, classes]. Raises ValueError: packages are missing, or the network cannot be
    written."""
    _require("onnx", "onnxscript")
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    printed = io.StringIO()
    refused = Explained(f"{type(module).__name__} cannot be written as ONNX (", "); export it as safetensors")
    with refused, warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(printed):
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


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The network of a file: images float32[batch, C, H, W] on the CPU to logits. Raises ValueError: packages
    are missing, the file is damaged, refers to other files than its own, holds loops or operators of others,
    or takes more than ``MAX_BYTES``."""
    _require("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    data = path.with_name(f"{path.name}.data")
    with Explained(f"{path} cannot be used: ", "; export the network again"):
        if path.is_symlink() or data.is_symlink():
            raise ValueError("it is a link")
        _check(onnx.load(path, load_external_data=False), data.name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        _limit_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,), (result,) = session.get_inputs(), session.get_outputs()

    def run(images: Tensor) -> Tensor:
        with Explained(f"{path} cannot be run: ", "; export the network again"):
            return torch.from_numpy(session.run([result.name], {given.name: images.numpy()})[0])

    return run


@functools.cache
def _limit_memory() -> None:
    """What every session that asks for it shares, so that no file can make it take all there is."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    limits = ort.OrtArenaCfg({"max_mem": MAX_BYTES, "arena_extend_strategy": 1})  # 1: no more than asked for
    ort.create_and_register_allocator(memory, limits)


def _check(model: Any, data: str) -> None:
    """Refuse what ``write_onnx`` never writes, wherever in the file it is."""
    messages = [model]
    while messages:
        message = messages.pop()
        for field, value in message.ListFields():
            if field.message_type is not None:
                messages += [value] if hasattr(value, "ListFields") else value
        kind = type(message).__name__
        if kind == "NodeProto" and (message.domain not in ("", "ai.onnx") or message.op_type in _UNBOUNDED):
            raise ValueError("it holds loops, or operators that are not ONNX's own")
        external = kind == "TensorProto" and (message.data_location or message.external_data)
        if external and [e.value for e in message.external_data if e.key == "location"] != [data]:
            raise ValueError("it refers to weights in another place")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}; run: pip install 'offload-sparse[onnx]'")
