"""The study: cells are runs in folders of their own, never run twice; rows have equal train FLOPs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from offload_sparse.bench import cells, study
from offload_sparse.bench.options import StudyConfig
from offload_sparse.bench.study import GROUPS, METHODS, equal_steps
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.policy.width_search import CYCLES
from offload_sparse.workloads.models import build_model


def finished(folder: Path, accuracy: float) -> None:
    (folder / "model").mkdir(parents=True)
    summary = {"test_accuracy": accuracy, "test_loss": 1.0, "params_ratio": 0.01, "flops_ratio": 0.0169}
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 10, "seconds": 2.0}))
    (folder / "config.yaml").write_text("data: {name: cifar10}")
    (folder / "metrics.jsonl").write_text('{"train_flops": 5.0}\n{"epoch": 1, "train_flops": 9.0}\n')
    groups = {"a": {"kept": [0, 1, 2]}, "b": {"kept": [4]}}
    (folder / "model" / "structure.json").write_text(json.dumps({"groups": groups}))


def test_finished_cells_are_not_run_again_and_their_figures_are_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudyConfig(set="vgg19", data="cifar10", flops=[0.0169], seeds=2, cache=str(tmp_path))
    steps = 40 * 351
    alone = [name for name in METHODS if name != "family"]
    for name in alone:
        for seed in range(2):
            finished(study.cell(config, tmp_path, steps, name, 0.0169, seed).folder, 0.8 + 0.02 * seed)
    monkeypatch.setattr(cells.subprocess, "Popen", lambda *_, **__: pytest.fail("run again"))
    result = study.run(config)
    for name in alone:
        key = f"study.vgg19.flops0.0169.{name}"
        assert result.ratios[f"{key}.accuracy"] == pytest.approx(81)
        assert result.ratios[f"{key}.spread"] == pytest.approx(2**0.5)
        assert result.ratios[f"{key}.train_cost_vs_even"] == 1
    assert all(len(row) == len(result.header) for row in result.table)


def test_found_takes_the_widths_that_the_probe_has_left(tmp_path: Path) -> None:
    config = StudyConfig(set="vgg19", data="cifar10", flops=[0.0169])
    finished(study.cell(config, tmp_path, 100, "probe", 0.0169, 0).folder, 0.8)
    assert study.cell(config, tmp_path, 100, "found", 0.0169, 0).options["static.widths"] == "3 1"


def test_runs_of_another_precision_are_other_runs(tmp_path: Path) -> None:
    configs = StudyConfig(data="cifar10"), StudyConfig(data="cifar10", precision="bf16")
    plain, bf16 = (study.cell(config, tmp_path, 10, "even", 0.1, 0) for config in configs)
    assert plain.folder != bf16.folder
    assert bf16.options == plain.options | {"train.precision": "bf16"}


def test_steps_of_a_row_take_the_same_train_flops() -> None:
    steps, groups = 14_000, GROUPS["vgg19"]
    assert equal_steps("even", steps, groups) == steps
    fewer = equal_steps("probe", steps, groups)
    assert 3 * fewer + 2 * CYCLES * 18 * groups == pytest.approx(3 * steps, rel=1e-3)
    assert 3.8 * equal_steps("sampled", steps, groups) == pytest.approx(3 * steps, rel=1e-3)
    assert equal_steps("probe", 100, groups) == 100, "no time for a cycle"


def test_a_budget_of_channels_is_that_of_the_flops_of_even_widths(tmp_path: Path) -> None:
    """FLOPs go with the product of two widths."""
    config = StudyConfig(set="vgg19", data="cifar10")
    expected = {"sampled": ("flops", 0.04), "counted": ("count", 0.2), "algorithm1": ("count", 0.2)}
    for name, (budget, rho) in expected.items():
        options = study.cell(config, tmp_path, 100, name, 0.04, 0).options
        assert (options["policy.budget"], options["policy.rho"]) == (budget, rho)
        assert options["train.max_steps"] == equal_steps("sampled", 100, 16)


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_of_a_set_are_those_of_its_network(name: str) -> None:
    options, _ = cells.SETS[name]
    side, channels = int(options.get("data.image_size", 32)), 1 if name == "fashion_mnist" else 3
    arguments = {"num_classes": 10, "in_channels": channels, "image_size": side}
    network = build_on_meta(partial(build_model, options["model.name"], **arguments))
    assert len(discover(network, (torch.zeros(1, channels, side, side),)).groups) == GROUPS[name]


def test_a_family_costs_what_its_members_cost_alone(tmp_path: Path) -> None:
    """Three members are all trained in every step; of five, the three in the middle take turns."""
    assert equal_steps("family", 900, 16, [0.1, 0.2, 0.4]) == 900
    turns = equal_steps("family", 900, 16, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert turns * (0.1 + 0.3 + 0.5) == pytest.approx(900 * 1.5, rel=1e-3)
    config = StudyConfig(set="vgg19", data="cifar10", flops=[0.4, 0.1])
    small, large = (study.cell(config, tmp_path, 100, "family", share, 0) for share in config.flops)
    assert small.folder == large.folder
    assert small.options["policy.budgets"] == [0.1, 0.4]
    finished(small.folder, 0.8)
    summary = json.loads((small.folder / "summary.json").read_text())
    member = {"test_accuracy": 0.7, "params_ratio": 0.1, "flops_ratio": 0.1}
    (small.folder / "summary.json").write_text(json.dumps(summary | {"members": {"0.1": member}}))
    runs = zip(config.flops, (small, large), strict=True)
    found = [study.figures(config, "family", share, run) for share, run in runs]
    assert [round(figures["accuracy"]) for figures in found] == [80, 70]


def test_a_family_is_compared_in_the_mean_over_members(tmp_path: Path) -> None:
    names, shares, steps = ["even", "family"], [0.1, 0.4], 40 * 351
    at = {"set": "vgg19", "data": "cifar10", "cache": str(tmp_path)}
    config = StudyConfig(flops=shares, methods=names, seeds=1, **at)  # type: ignore[arg-type]
    cells = [study.cell(config, tmp_path, steps, name, share, 0) for name in names for share in shares]
    for cell, accuracy in zip(cells, (0.70, 0.80, 0.83), strict=False):
        finished(cell.folder, accuracy)
    summary = json.loads((cells[-1].folder / "summary.json").read_text())
    member = {"test_accuracy": 0.69, "params_ratio": 0.1, "flops_ratio": 0.1}
    (cells[-1].folder / "summary.json").write_text(json.dumps(summary | {"members": {"0.1": member}}))
    assert study.run(config).ratios["study.vgg19.family.gain"] == pytest.approx((-1 + 3) / 2)


@pytest.mark.slow
def test_small_cells_run_and_cost_the_same(tmp_path: Path) -> None:
    config = StudyConfig(methods=["even", "probe", "sampled", "none"], seeds=1, epochs=1, cache=str(tmp_path))
    result = study.run(config)
    for name in ("even", "probe", "sampled", "none"):
        key = f"study.fashion_mnist.flops0.064.{name}"
        assert result.ratios[f"{key}.accuracy"] > 20
        assert result.ratios[f"{key}.train_cost_vs_even"] == pytest.approx(1, abs=0.12)
