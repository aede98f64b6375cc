"""Tensors in the safetensors format, written straight out of the memory they are in.

    8 bytes: length of the header | header: JSON, {name: dtype, shape, byte range} | the tensors' bytes

``safetensors.torch.save_file`` refuses tensors that share memory, as the views of a store do, and wants every
byte copied first; so files are written here, and read with the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 16 << 20
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def blocks_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """The bytes of a file with ``tensors`` (of any device) and ``metadata``, in order, a few megabytes at a
    time. Tensors must stay as they are until the last block is taken: a contiguous one of the CPU is not
    copied. Raises ValueError: the format has no name for the type of a tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so all are aligned
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} is of type {tensor.dtype}, which safetensors cannot hold; convert it")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        for part in tensor.detach().reshape(-1).split(max(1, _BLOCK // tensor.element_size())):
            if part.numel():
                yield memoryview(part.cpu().contiguous().view(torch.uint8).numpy())
