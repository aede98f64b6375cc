"""Every Python block of every README runs as it stands there, in order, each file in one namespace.

What a reader brings (a network, a loader, an example input) is here; what a block is about is not.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith((".", "runs", "build")) for part in path.relative_to(ROOT).parts)
)


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line, text) of the Python blocks of a file."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


class MyModel(nn.Module):
    """Two layers by the names that the example of a map by hand uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def what_a_reader_brings() -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 12), torch.randint(4, (64,)))
    example = data.tensors[0][:2]
    given = dict.fromkeys(("example", "example_inputs", "images", "x"), example)
    return given | {
        "__name__": "readme",
        "MyModel": MyModel,
        "model": MyModel(),
        "loader": DataLoader(data, 16),
        "example_inputs": (example,),
        "path": "state.pt",
        "torch": torch,
        "nn": nn,
        "F": F,
        "partial": partial,
        "Path": Path,
    }


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks write into a folder of their own, in which a run has been finished."""
    monkeypatch.chdir(tmp_path)


def test_there_are_readmes_with_python() -> None:
    assert sum(len(blocks(path)) for path in READMES) >= 3


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    "path", [path for path in READMES if blocks(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_blocks_of_a_readme_run_as_they_stand(path: Path) -> None:
    space = what_a_reader_brings()
    for line, text in blocks(path):
        if "runs/" in text:
            finished_run(re.findall(r'"(runs/[\w./-]+)/model"', text))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(compile("\n" * (line - 1) + text, str(path), "exec"), space)


def finished_run(folders: list[str]) -> None:
    """Exports where a block reads those of a run."""
    from offload_sparse import SparseOffload
    from offload_sparse.engine.config import OptimConfig
    from offload_sparse.engine.optimizer import optimizer_factory
    from offload_sparse.workloads.models import build_model

    for folder in folders:
        name, arguments = "offload_sparse/mlp", {"stream": 16, "hidden": 32, "depth": 1}
        factory = partial(build_model, name, 4, 1, 8, **arguments)
        session = SparseOffload(
            factory, torch.zeros(1, 1, 8, 8), optimizer_factory(OptimConfig()), rho=0.5, total_steps=2
        )
        for _ in range(2):
            session.step(lambda network: network(torch.randn(4, 1, 8, 8)).square().mean())
        os.makedirs(folder, exist_ok=True)
        whole = {"num_classes": 4, "in_channels": 1, "image_size": 8} | arguments
        session.finalize().save(f"{folder}/model", {"name": name, "arguments": whole})
