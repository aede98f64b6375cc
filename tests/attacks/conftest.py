"""What the attacks on files share: networks that were exported, which every attack copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sparse.export.convert import export_network
from tests.support.hostile_files import save_networks
from tests.support.made_once import made_once


@pytest.fixture(scope="session")
def exported() -> Path:
    """The networks of ``save_networks``, graphs of two of them, and a program of the first."""
    return made_once("attacked", _export)


def _export(folder: Path) -> None:
    save_networks(folder)
    for name in ("vgg_small", "lenet_300_100"):
        export_network(folder / name, "onnx", folder / f"{name}_onnx")
    export_network(folder / "vgg_small", "torch_export", folder / "program")
