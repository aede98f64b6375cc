"""A dry run says what a run would be, and reads and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_sparse.cli.main import main
from offload_sparse.config import parse as arguments
from offload_sparse.config.methods import StaticConfig
from offload_sparse.config.run import RunConfig, resolve
from offload_sparse.engine.config import RoundConfig
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.plan.dry_run import dry_run, knob, passes
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.data.loader import DeclaredData, declared_data
from offload_sparse.workloads.data.source import load_splits

VGG = ModelConfig("offload_sparse/vgg_small")


def saving_of(**settings: Any) -> tuple[float, float]:
    """Train-cost saving, and the share of the dense FLOPs that a forward pass of the subnet takes."""
    figures = dry_run(resolve(RunConfig(**settings), "cpu"))
    return figures["train_cost_saving"], figures["flops_ratio"]


# The formulas of appendix C, Zhou et al. 2021: a backward pass costs two forward passes.


@pytest.mark.parametrize("reference", ["every_step", "turns"])
@pytest.mark.parametrize("rho", [0.5, 0.25])
def test_one_backward_and_two_forwards_per_step_save_three_over_four_f(reference: Any, rho: float) -> None:
    saving, f = saving_of(
        policy=PolicyConfig(rho, search="sampled"), round=RoundConfig(reference=reference, freeze_at=1)
    )
    assert saving == pytest.approx(3 / (4 * f), rel=1e-12)


def test_a_reference_once_per_round_costs_its_share_of_a_forward_pass() -> None:
    saving, f = saving_of(round=RoundConfig(k=10, reference="round_start", freeze_at=1))
    steps = 460  # of ten epochs of 46
    assert saving == pytest.approx(3 / ((3 + 46 / steps) * f), rel=1e-12)


def test_with_the_structure_frozen_there_is_no_reference_to_pay() -> None:
    frozen, f = saving_of(round=RoundConfig(freeze_at=0))
    assert frozen == pytest.approx(1 / f, rel=1e-12)
    half, f = saving_of(policy=PolicyConfig(search="sampled"), round=RoundConfig(freeze_at=0.5))
    assert half == pytest.approx(3 / (3.5 * f), rel=1e-12)


def test_everything_kept_saves_nothing_and_needs_no_reference() -> None:
    assert saving_of(policy=PolicyConfig(rho=1.0)) == (1, 1)


def test_the_controls_pay_for_one_forward_and_one_backward() -> None:
    assert saving_of(method="dense") == (1, 1)
    saving, f = saving_of(method="static", policy=PolicyConfig(0.25))
    assert saving == pytest.approx(1 / f, rel=1e-12)
    for method in ("dense", "static"):
        config = RunConfig(method=method, policy=PolicyConfig(search="forward"))
        assert list(passes(config, 7.0, 1000, 10)) == [(7.0, 1000, 1000)], "whatever a search would leave out"
    saving, f = saving_of(method="static", policy=PolicyConfig(0.2, budget="flops"))
    assert 0.15 < f <= 0.2
    assert saving == pytest.approx(1 / f, rel=1e-12)


def test_rigl_keeps_its_density_of_the_layers_that_it_masks() -> None:
    figures = dry_run(resolve(RunConfig(method="rigl", policy=PolicyConfig(rho=0.1, budget="flops")), "cpu"))
    assert 0.1 < figures["params_ratio"] < 0.12, "biases and norms are not masked"
    assert 0.1 < figures["flops_ratio"] < 0.6, "early layers are denser, and spend more"
    assert figures["knob"] == "rho 0.1", "of the weights, whatever a search would count"


def test_the_passes_count_one_backward_per_step() -> None:
    sampled = PolicyConfig(search="sampled")
    config = RunConfig(policy=sampled, round=RoundConfig(k=50, reference="turns", freeze_at=0.8))
    assert list(passes(config, 7.0, 1000, 10)) == [(7.0, 1000, 1000), (7.0, 800, 0)]
    config = RunConfig(policy=sampled, round=RoundConfig(sync="round", subnets="per_rank"))
    assert list(passes(config, 7.0, 1000, 10)) == [(7.0, 1000, 1000)], "which are compared with each other"
    config = RunConfig(policy=PolicyConfig(search="probe"), round=RoundConfig(freeze_at=0.4))
    _, (_, probes, backwards) = passes(config, 7.0, 10_000, 10)
    assert (probes, backwards) == (2 * 4 * 180, 0)


@pytest.mark.parametrize("search", ["none", "probe"])
def test_a_step_of_a_family_trains_three_members_once_the_search_is_over(search: Any) -> None:
    policy = PolicyConfig(rho=0.1, budget="flops", budgets=[0.4, 0.1, 0.2, 0.3], search=search)
    saving, f = saving_of(model=VGG, policy=policy, round=RoundConfig(freeze_at=0.4))
    assert f == pytest.approx(0.4, rel=0.03)
    searched = 0.4 if search == "probe" else 0.0
    per_step = searched * 0.1 + (1 - searched) * (0.1 + 0.25 + 0.4)
    assert 1 / saving == pytest.approx(per_step, rel=0.05)


def test_given_widths_count_as_a_search_takes_them() -> None:
    """One by probes scales them to its budget, another one keeps them or is refused, as in a run."""

    def flops(search: Any) -> float:
        policy = PolicyConfig(rho=0.1, budget="flops", search=search)
        static, rounds = StaticConfig("16 16 32 32 64 64"), RoundConfig(freeze_at=0.4)
        return saving_of(model=VGG, policy=policy, static=static, round=rounds)[1]

    assert flops("probe") == pytest.approx(0.1, rel=0.03)
    assert flops("none") == pytest.approx(0.25, rel=0.03)
    with pytest.raises(ValueError, match="is sampled, which begins with no widths"):
        flops("sampled")


def test_only_a_method_that_trains_a_family_is_known_by_its_shares() -> None:
    policy = PolicyConfig(rho=0.1, budgets=[0.4, 0.2], search="none")
    knobs = [knob(RunConfig(method=method, policy=policy)) for method in ("sparse_offload", "static")]  # type: ignore[arg-type]
    assert knobs == ["rho 0.2, 0.4", "rho 0.1"]


# Data that is declared, not read


def test_the_embedded_set_is_known_without_reading_it() -> None:
    splits = load_splits(DataConfig())
    declared = declared_data(DataConfig())
    assert declared.num_classes == splits.num_classes
    assert declared.channels == splits.in_channels
    assert declared.image_shape == splits.image_shape
    assert declared.train_images == len(splits.train)


def test_held_out_and_limited_images_are_no_steps() -> None:
    for settings in (
        {"validation": 0.25},
        {"limit": 700},
        {"validation": 0.5, "limit": 9_000},
    ):
        config = DataConfig(**settings)  # type: ignore[arg-type]
        assert declared_data(config).train_images == len(load_splits(config).train)


@pytest.mark.parametrize("missing", ["num_classes", "channels", "image_size", "train_images"])
def test_what_is_not_declared_is_asked_for_by_name(missing: str) -> None:
    declared = {"num_classes": 10, "channels": 3, "image_size": 32, "train_images": 100} | {missing: 0}
    size = declared.pop("image_size")
    config = DataConfig(name="someone/pictures", image_size=size, declared=declared)
    with pytest.raises(ValueError, match=rf"set data\.(declared\.)?{missing}"):
        declared_data(config)


def test_a_declared_data_set_is_taken_at_its_word() -> None:
    config = DataConfig(
        name="x/y", image_size=40, declared={"num_classes": 7, "channels": 3, "train_images": 900}
    )
    assert declared_data(config) == DeclaredData(7, 3, (40, 40), 900)
    figures = dry_run(resolve(RunConfig(data=config, model=VGG), "cpu"))
    assert (figures["steps_per_epoch"], figures["steps"]) == (3, 30)


def test_the_command_prints_the_row_to_reach_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    paper = ["--paper.source", "Somebody, Table 1", "--paper.accuracy", "92.5", "--paper.params", "4.4"]
    assert main(["train", "--dry_run", "--run_dir", str(run_dir), *paper]) == 0
    printed = capsys.readouterr().out
    for shown in ("Table 1", "92.5 %", "4.4 %", "vgg_small", "460 (46)"):
        assert shown in printed
    assert not run_dir.exists()


@pytest.mark.parametrize("outputs", [5, "ten"])
def test_fewer_outputs_than_classes_are_refused(outputs: Any) -> None:
    """Which training would meet as a label without a logit."""
    model = ModelConfig(VGG.name, arguments={"num_classes": outputs})
    with pytest.raises(ValueError, match=f"num_classes is {outputs!r}, and there are 10 classes; remove it"):
        dry_run(resolve(RunConfig(model=model), "cpu"))


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--dry_run"]) == 0
    assert capsys.readouterr().out == ""


def test_a_percentage_above_100_is_refused() -> None:
    with pytest.raises(ValueError, match=r"paper\.flops is 870"):
        arguments.parse(["--paper.flops", "870"])
