"""What the attacks on files share: networks that were exported, which every attack copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sparse.export.convert import export_network
from tests.support.hostile_files import save_networks


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of ``save_networks``, and a graph of the first."""
    folder = tmp_path_factory.mktemp("networks")
    save_networks(folder)
    export_network(folder / "vgg_small", "onnx", folder / "vgg_small_onnx")
    return folder
