"""Cells of pretrained networks: their options, what is compared with what, and what loading reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sparse.bench import cells, pretrained
from offload_sparse.bench.cells import Run
from offload_sparse.bench.options import PretrainedConfig
from offload_sparse.bench.pretrained import ARMS
from tests.support.ranks import run_ranks


def finished(folder: Path, accuracy: float, steps: int = 10) -> None:
    folder.mkdir(parents=True)
    summary = {"test_accuracy": accuracy, "params_ratio": 0.3, "flops_ratio": 0.3, "train_cost_saving": 2.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": steps, "seconds": 2.0}))
    lines = [{"step": 4, "test_accuracy": accuracy - 0.1}, {"step": 8, "test_accuracy": accuracy - 0.005}]
    flops = {"step": steps, "train_flops": 3.0 * 128 * steps}
    (folder / "config.yaml").write_text("data: {name: cifar10}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, flops]))


def cell(config: PretrainedConfig, folder: Path, arm: str = "dense", seed: int = 0) -> Run:
    return pretrained.cell(config, folder, arm, 0.5, 3, seed)


def test_finished_cells_are_compared_with_the_best_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainedConfig(set="resnet20", data="cifar10", rho=[0.5], epochs=[3], cache=str(tmp_path))
    finished(cell(config, tmp_path).folder, 0.9)
    for number, arm in enumerate(ARMS):
        for seed in range(2):
            finished(cell(config, tmp_path, arm, seed).folder, 0.8 + 0.01 * number + 0.02 * seed)
    monkeypatch.setattr(cells.subprocess, "Popen", lambda *_, **__: pytest.fail("run again"))
    monkeypatch.setattr(pretrained, "loading", lambda quick: {"pretrained.read": 1.0})
    result = pretrained.run(config)
    key = "pretrained.resnet20.rho0.5.epochs3"
    assert result.ratios["pretrained.resnet20.dense.accuracy"] == pytest.approx(90)
    for number, arm in enumerate(ARMS):
        assert result.ratios[f"{key}.{arm}.accuracy"] == pytest.approx(81 + number)
        assert result.ratios[f"{key}.{arm}.spread"] == pytest.approx(2**0.5)
    assert result.ratios[f"{key}.search_vs_cut"] == pytest.approx(2), "norm_scale is the best of the cuts"
    assert all(len(row) == len(result.header) for row in result.table)
    runs = result.raw[f"{key}.distilled_forward"]
    assert runs[1]["steps_to"] == 8, "0.905, and two points below the dense network are 0.88"
    assert [run["steps_to_scratch"] for run in runs] == [8, 4], "scratch ends with 0.81"
    assert runs[0]["search_flops"] == pytest.approx(3 * 128 * (10 - 8 * 2 * 0.3)), "8 of 10 steps train it"
    assert result.raw[f"{key}.norm_scale"][0]["search_flops"] == 0
    assert runs[0]["teacher_flops"] == pytest.approx(45_000 * 2.0), "a forward pass per image, of 2 FLOPs"


def test_arms_but_scratch_take_weights_or_logits_of_the_dense_run(tmp_path: Path) -> None:
    config = PretrainedConfig()
    dense = cell(config, tmp_path)
    assert dense.options["method"] == "dense"
    for arm in ARMS:
        options = cell(config, tmp_path, arm).options
        taken = {"scratch": None, "distilled_scratch": f"{dense.folder}+logits_only"}
        assert options.get("model.weights") == taken.get(arm, str(dense.folder))
        assert options["policy.rho"] == 0.5


def test_a_rank_reads_its_rows_and_holds_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file of 0.13 GB; the bench takes 2 GB, and processes that import torch anew."""
    monkeypatch.setattr(pretrained, "on_ranks", run_ranks)
    found = pretrained.loading(quick=True)
    assert found["pretrained.read"] <= 1.1
    assert found["pretrained.rss"] <= 60e6, "less than the rows of the other rank"
