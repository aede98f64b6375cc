"""Is what was written what will be read? Every export is read in a fresh process and compared on batches.

    this process                        reader (started once, ends with this process or after a minute idle)
    outputs of the network
    question     ── socket ──▶          fork ──▶ unpickles the question, reads the files, computes
    compares     ◀── answer                                    └─ ends

A fresh interpreter takes seconds to import torch; the reader has done so, and a fork of it takes milliseconds
and has seen nothing of this process. A network whose constructor no other process can import (from a script's
``__main__``, or inside a function) is built anew and read in this process instead.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from offload_sparse.channels.model_call import Inputs, output_tensors, seeded
from offload_sparse.channels.require import Explained

TOLERANCE = 1e-4
"""Largest difference between the outputs, relative to the largest output."""

Reader = Callable[[], Callable[..., Any]]
"""Reads a network; called in another process, if it can be pickled."""

_IDLE_SECONDS = 60.0
_READY = b"ready\n"
_LONGEST_FOLDER = 80
"""Bytes of the folder for temporary files; the address of a socket in one of these has room for about 100."""

_server: tuple[subprocess.Popen[bytes], str] | None = None


def compare(
    read: Reader, module: nn.Module, batches: Sequence[Inputs], place: Path, needs: Sequence[str] = ()
) -> float:
    """The largest relative difference between the outputs of ``module`` and of what ``read`` reads of it from
    ``place``, over all ``batches`` of inputs, which need not have values. What ``read`` ``needs`` are modules
    that take long to import: the reader keeps them. Raises ValueError: it cannot be read, or the difference
    is above ``TOLERANCE``."""
    batches = tree_map_only(Tensor, _with_values, batches)
    expected = _of_all(_on_cpu(module), batches)
    question = _pickled((read, batches))
    with Explained(f"what was written to {place} cannot be read back: "):
        found = _of_all(read(), batches) if question is None else _ask(question, needs)
    worst = _difference(expected, found)
    epsilon = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    if not worst <= max(TOLERANCE, 16 * epsilon):
        raise ValueError(f"what was read back from {place} differs by {worst:.1e}; do not use it")
    return worst


@torch.no_grad()
def outputs(network: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Every tensor that a network in evaluation mode gives, whatever holds them."""
    with seeded(0):  # for a network that draws numbers
        return [tensor.detach() for tensor in output_tensors(network(*inputs))]


def _of_all(network: Callable[..., Any], batches: Sequence[Inputs]) -> list[Tensor]:
    return [tensor for inputs in batches for tensor in outputs(network, inputs)]


def serve(address: str, idle: float) -> None:
    """The reader: answer every question in a child that has seen no other, until nobody is left to ask, or
    nobody has for ``idle`` seconds. The folder of the socket at ``address`` goes with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children end unattended
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, _READY)
        while listener.fileno() in select.select([listener.fileno(), 0], [], [], idle)[0]:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as question:
                for name in json.loads(question.readline()):  # which children then need not import
                    with suppress(ImportError):  # told by the child that needs it
                        __import__(name)
                if os.fork() == 0:
                    connection.sendall(pickle.dumps(_answer(question)))
                    os._exit(0)
    shutil.rmtree(os.path.dirname(address), ignore_errors=True)


def _answer(question: IO[bytes]) -> list[Tensor] | str:
    """What the network gives, or why there is nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        working_folder, sys.path[:], threads, asked = pickle.load(question)
        os.chdir(working_folder)  # paths may be relative, and networks lie beside the script that asks
        torch.set_num_threads(threads)
        read, batches = pickle.loads(asked)
        return _of_all(read(), batches)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _ask(question: bytes, needs: Sequence[str]) -> list[Tensor]:
    conditions = os.getcwd(), sys.path, torch.get_num_threads()
    heavy = [name for name in ("torchvision", "timm", "onnxruntime") if name in sys.modules] + [*needs]
    with _connection() as connection, connection.makefile("rb") as reply:
        connection.sendall(json.dumps(heavy).encode() + b"\n" + pickle.dumps((*conditions, question)))
        found = reply.read()  # which ends when the child does
    answer: list[Tensor] | str = pickle.loads(found) if found else "the reading process died"
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _connection() -> socket.socket:
    """To the reader, which is started where there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_server[1] if _server else "")
    except OSError:
        connection.connect(_start())
    return connection


def _start() -> str:
    global _server
    long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER  # that of a batch job, say
    address = f"{tempfile.mkdtemp(dir='/tmp' if long else None)}/socket"
    code = "import sys, offload_sparse.export.open as _; from offload_sparse.export.read_back import serve"
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{code}; serve(sys.argv[1], {_IDLE_SECONDS})", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != _READY:
        raise ValueError(f"no process could be started to read it back (exit code {process.wait()})")
    _server = process, address  # the end of this process closes its standard input, which ends it
    return address


def _pickled(question: Any) -> bytes | None:
    """None where another process could not import what the question names."""
    try:
        data = pickle.dumps(question)
    except Exception:  # pickle raises errors of many kinds
        return None
    return None if b"__main__" in data or b"__mp_main__" in data else data


def _on_cpu(module: nn.Module) -> nn.Module:
    tensors = (*module.parameters(), *module.buffers())
    if module.training or any(tensor.device.type != "cpu" for tensor in tensors):
        return copy.deepcopy(module).cpu().eval()
    return module


def _with_values(example: Tensor) -> Tensor:
    """A tensor like an example: its values, unless it has none, or floating ones that are all the same."""
    if example.is_floating_point() and (
        example.is_meta or not example.numel() or bool(example.min() == example.max())
    ):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(example.shape, generator=generator).to(example.dtype)
    return torch.zeros_like(example, device="cpu") if example.is_meta else example.detach().cpu()


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        one, other = one.to(torch.float64), other.to(torch.float64)
        scale = one.abs().nan_to_num(0.0, posinf=0.0).amax().clamp_min(1e-30) if one.numel() else 1.0
        same = (one == other) | (one.isnan() & other.isnan())
        error = ((one - other).abs() / scale).masked_fill(same, 0.0).nan_to_num(float("inf"))
        worst = max(worst, float(error.amax()) if error.numel() else 0.0)
    return worst
