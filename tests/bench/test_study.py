"""The study: every method is trained on the same images, controls take over what the recipe has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offload_sparse.bench import study
from offload_sparse.bench.cells import Images
from offload_sparse.bench.options import StudyConfig
from offload_sparse.workloads.data.loader import Batch
from offload_sparse.workloads.data.normalise import Normalise


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Batch:
        labels = torch.arange(count) % 10
        pixels = torch.randint(0, 60, (count, 1, 14, 14), generator=generator)
        pixels[torch.arange(count), 0, labels] += 180  # each class has a bright row of its own
        return Batch(pixels.to(torch.uint8), labels)

    made = Images("rows", part(256), part(100), 10)
    monkeypatch.setattr(study, "_images", lambda *_, **__: (made, Normalise([0.3], [0.3])))
    return made


def test_every_method_has_its_figures_and_is_not_run_twice(images: Images, tmp_path: Path) -> None:
    config = StudyConfig(rhos=[0.25], seeds=1, epochs=4, cache=str(tmp_path))
    result = study.run(False, config)
    for method in study.METHODS:
        key = f"study.fashion_mnist.rho0.25.{method}"
        assert {f"{key}.accuracy", f"{key}.spread"} <= result.ratios.keys()
    runs = result.raw["runs"]
    recipe, longer = runs["rho0.25.recipe"][0], runs["rho0.25.static_longer"][0]
    assert runs["rho0.25.static_learned"][0]["widths"] == recipe["widths"]
    assert longer["steps"] * longer["train_cost"] == pytest.approx(
        recipe["steps"] * recipe["train_cost"], rel=0.2
    )
    static = runs["rho0.25.static"][0]
    assert recipe["flops_ratio"] <= static["flops_ratio"] * (1 + 1e-9)
    assert runs["rho0.25.dense"][0]["flops_ratio"] == 1
    assert static["dynamics"][0].keys() < recipe["dynamics"][0].keys()
    files = list(tmp_path.glob("*.json"))
    assert len(files) == len(study.METHODS)
    for file in files:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"accuracy": 12.5}))
    again = study.run(False, config)
    assert {value for key, value in again.ratios.items() if key.endswith(".accuracy")} == {12.5}


def test_a_plot_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    point = {"accuracy": 80.0, "train_cost": 0.1, "steps": 10}
    found = {(0.25, "static"): [point, point | {"accuracy": 82.0}], (0.1, "recipe"): [point]}
    study.draw(found, "rows", tmp_path / "plots" / "study.png")
    assert (tmp_path / "plots" / "study.png").stat().st_size > 1000
