"""Offload-Sparse: train networks that are larger than the GPU they are trained on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_sparse.engine.forward import Forward
    from offload_sparse.engine.session import Setup, SparseOffload
    from offload_sparse.export.network_file import FinalNetwork, load_pruned

__all__ = ["FinalNetwork", "Forward", "Setup", "SparseOffload", "load_pruned"]

_HOMES = {
    "FinalNetwork": "offload_sparse.export.network_file",
    "Forward": "offload_sparse.engine.forward",
    "Setup": "offload_sparse.engine.session",
    "SparseOffload": "offload_sparse.engine.session",
    "load_pruned": "offload_sparse.export.network_file",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``offload-sparse --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
