"""``policy.search auto`` and ``round.freeze_at auto``: what a run takes, and what a loop of your own does."""

from __future__ import annotations

from typing import Any

import pytest

from offload_sparse.config.parse import RUN_OPTIONS
from offload_sparse.config.run import resolve
from offload_sparse.engine.config import SEARCHED
from offload_sparse.policy.config import PolicyConfig


@pytest.mark.parametrize(
    ("given", "search"),
    [
        ([], "none"),
        (["--train.epochs", "29"], "none"),
        (["--train.epochs", "30"], "probe"),
        (["--model.weights", "timm"], "sampled"),
        (["--round.freeze_at", "0.3"], "probe"),
        (["--policy.budgets", "[0.25, 0.5]", "--train.epochs", "90"], "probe"),
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
def test_a_long_run_probes_widths_unless_something_else_is_asked_for(given: list[str], search: str) -> None:
    assert RUN_OPTIONS.parse(given).policy.search == search


@pytest.mark.parametrize("search", SEARCHED)
def test_the_end_of_the_search_goes_with_it_and_is_written_down(search: Any) -> None:
    config = resolve(RUN_OPTIONS.parse(["--policy.search", search]), "cpu")
    assert config.round.freeze_at == SEARCHED[search]
    given = resolve(RUN_OPTIONS.parse(["--policy.search", search, "--round.freeze_at", "0.5"]), "cpu")
    assert given.round.freeze_at == 0.5


def test_a_loop_of_ones_own_samples_since_its_learning_rate_is_its_own() -> None:
    assert PolicyConfig().resolved(compiled=False).search == "sampled"
    assert PolicyConfig(search="probe").resolved(compiled=False).search == "probe"
