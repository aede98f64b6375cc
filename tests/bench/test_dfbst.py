"""The bench of the LeNets: finished cells are kept, and the keys are those of the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offload_sparse.bench import dfbst
from offload_sparse.bench.dfbst import RESET_AT, Cell, Images
from offload_sparse.bench.options import DFBSTBenchConfig
from offload_sparse.workloads.data.loader import Batch

CPU = torch.device("cpu")


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Batch:
        labels = torch.arange(count) % 10
        pixels = torch.randint(0, 60, (count, 1, 28, 28), generator=generator)
        pixels[torch.arange(count), 0, 2 * labels] += 180  # each class has a bright row of its own
        return Batch(pixels.to(torch.uint8), labels)

    made = Images("rows", part(256), part(100), 10)
    monkeypatch.setattr(dfbst, "_images", lambda name: made)
    return made


def test_a_finished_cell_is_not_run_again(images: Images, tmp_path: Path) -> None:
    cell = Cell("lenet300", "dfbst", 0, 6, RESET_AT)
    first = dfbst._kept(cell, images, CPU, str(tmp_path))
    path = tmp_path / cell.file_name(images)
    assert json.loads(path.read_text()) == first
    assert first["layers"].keys() == {"fc1", "fc2", "fc3"}
    path.write_text(json.dumps(first | {"accuracy": 12.5}))
    assert dfbst._kept(cell, images, CPU, str(tmp_path))["accuracy"] == 12.5
    other = Cell("lenet300", "dfbst", 1, 6, RESET_AT)
    assert other.file_name(images) != cell.file_name(images)


def test_every_method_has_its_figures(images: Images, tmp_path: Path) -> None:
    result = dfbst.run(True, DFBSTBenchConfig(seeds=2, epochs=1, cache=str(tmp_path)))
    for model in ("lenet300", "lenet5"):
        for method in ("dense", "dst", "dfbst"):
            key = f"dfbst.{model}.{method}"
            assert {f"{key}.accuracy", f"{key}.spread", f"{key}.remaining"} <= result.ratios.keys()
            assert (result.ratios[f"{key}.remaining"] == 1) == (method == "dense")
    assert len(list(tmp_path.glob("*.json"))) == 12
