"""``policy.search auto`` and ``round.freeze_at auto``: what a run takes, and what a loop of your own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_sparse.config.parse import RUN_OPTIONS, dump
from offload_sparse.config.run import resolve
from offload_sparse.engine.config import SEARCHED, RoundConfig
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.resume import differences, run_values


@pytest.mark.parametrize(
    ("given", "search"),
    [
        ([], "probe"),
        (["--model.weights", "timm"], "none"),
        (["--model.weights", "timm", "--policy.budgets", "[0.25, 0.5]"], "none"),
        (["--model.weights", "timm", "--policy.lr", "0.012"], "sampled"),
        (["--model.weights", "timm", "--round.freeze_at", "0.3"], "sampled"),
        (["--model.weights", "timm+logits_only", "--train.distill", "true"], "probe"),
        (["--round.freeze_at", "0.3"], "probe"),
        (["--policy.budgets", "[0.25, 0.5]"], "probe"),
        (["--policy.search", "none"], "none"),
        (["--method", "grow_efficient"], "sampled"),
        (["--policy.sampler", "bernoulli"], "sampled"),
        (["--policy.estimator", "rloo"], "sampled"),
        (["--policy.parametrisation", "atom"], "sampled"),
        (["--policy.optimizer", "adam"], "sampled"),
        (["--policy.lr", "0.012"], "sampled"),
        (["--round.reference", "every_step"], "sampled"),
        (["--round.sync", "round", "--round.subnets", "per_rank"], "sampled"),
        (["--optim.schedule", "constant"], "sampled"),
        (["--round.freeze_at", "0.05"], "sampled"),
        (["--round.freeze_at", "1"], "sampled"),
    ],
)
def test_a_run_probes_widths_unless_something_else_is_asked_for(given: list[str], search: str) -> None:
    assert RUN_OPTIONS.parse(given).policy.search == search


@pytest.mark.parametrize("search", SEARCHED)
def test_the_end_of_the_search_goes_with_it_and_is_written_down(search: Any) -> None:
    config = resolve(RUN_OPTIONS.parse(["--policy.search", search]), "cpu")
    assert config.round.searched(search) == SEARCHED[search]
    assert (config.round.freeze_at == "auto") == (search == "probe"), "which depends on the steps of the run"
    given = resolve(RUN_OPTIONS.parse(["--policy.search", search, "--round.freeze_at", "0.5"]), "cpu")
    assert given.round.freeze_at == 0.5


@pytest.mark.parametrize(
    ("total", "steps"),
    [(6_000, 0), (6_400, 1_600), (14_040, 3_510), (25_600, 6_400), (56_160, 6_400), (500_000, 50_000)],
)
def test_a_probe_has_a_quarter_of_a_short_run_and_a_tenth_of_a_long_one(total: int, steps: int) -> None:
    assert RoundConfig().freeze_step("probe", total) == steps
    assert RoundConfig(freeze_at=0.25).freeze_step("probe", total) == total // 4


def test_a_run_that_is_made_longer_is_the_same_run() -> None:
    """Whether there is time for a search or not: the end of a short one has been trained for good."""
    short, long = (resolve(RUN_OPTIONS.parse(["--train.epochs", epochs]), "cpu") for epochs in ("2", "400"))
    assert not differences(run_values(short), run_values(long))


@pytest.mark.parametrize("method", ["dense", "static", "dst", "dfbst", "rigl"])
def test_the_settings_of_a_run_serve_another_method(method: str, tmp_path: Path) -> None:
    """Read from its config.yaml they search as if it had never been written; earlier versions did not, and
    their runs are still the same runs."""
    run = resolve(RUN_OPTIONS.parse(["--method", method]), "cpu")
    (tmp_path / "config.yaml").write_text(dump(run))
    ours = RUN_OPTIONS.parse(["--config", str(tmp_path / "config.yaml"), "--method", "sparse_offload"])
    assert resolve(ours, "cpu") == resolve(RUN_OPTIONS.parse([]), "cpu")
    written = {"policy.search": "sampled", "round.freeze_at": 0.05}
    assert not differences(run_values(run) | written, run_values(run))
    assert differences(run_values(ours) | written, run_values(ours))


def test_a_loop_of_ones_own_samples_since_its_learning_rate_is_its_own() -> None:
    assert PolicyConfig().resolved(compiled=False).search == "sampled"
    assert PolicyConfig().resolved(compiled=False, trained=True).search == "none"
    assert PolicyConfig(sampler="bernoulli").resolved(compiled=False, trained=True).search == "sampled"
    assert PolicyConfig(search="probe").resolved(compiled=False).search == "probe"
