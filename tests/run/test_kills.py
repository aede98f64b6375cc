"""A run killed with ``kill -9`` at any phase and started again by the same command is the run that was never
killed, bit for bit: weights, slots, statistics, keep probabilities, generators, next batch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse.engine.faults import PHASES
from tests.run import killed_run

CONFIGURATIONS = {
    "no_prefetch": ["--round.prefetch", "false"],
    "prefetch": ["--round.transfer", "delta"],
    "overlap": ["--round.transfer", "overlap"],
    "file": ["--store.tier", "file"],
    "family": [
        *("--policy.search", "probe", "--round.freeze_at", "0.5", "--store.tier", "file"),
        *("--policy.rho", "0.3", "--policy.budgets", "[0.3, 0.5, 0.8]"),
    ],
    "round": ["--round.sync", "round", "--optim.warmup_epochs", "0"],
    "probe": [
        *("--policy.search", "probe", "--round.freeze_at", "0.5", "--train.epochs", "100"),
        *("--train.max_steps", "48", "--checkpoint.every", "5", "--policy.rho", "0.4"),
    ],
}
FATAL_STEP = {"family": killed_run.STEPS // 2, "probe": 12}
"""At which the members' own norms begin, and at which widths move."""
STEPS = {"probe": 48}
QUICK_ON_ONE_RANK = [("overlap", phase) for phase in PHASES]
QUICK_ON_ONE_RANK += [("family", "sample"), ("probe", "sample"), ("probe", "scatter")]
QUICK_ON_TWO_RANKS = [("overlap", "scatter"), ("overlap", "checkpoint-commit"), ("probe", "sample")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the undisturbed run of a configuration leaves, made once."""

    @cache
    def made(configuration: str, ranks: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("straight")
        codes, log = killed_run.run(folder, "run", ranks, CONFIGURATIONS[configuration])
        assert codes == [0] * ranks, log
        return killed_run.left(folder, "run", ranks)

    return made


def cases() -> Iterator[Any]:
    for ranks in (1, 2):
        for configuration in CONFIGURATIONS:
            for phase in PHASES:
                quick = (configuration, phase) in (QUICK_ON_ONE_RANK, QUICK_ON_TWO_RANKS)[ranks - 1]
                yield pytest.param(
                    *(ranks, configuration, phase),
                    marks=() if quick else pytest.mark.slow,
                    id=f"{ranks}-{configuration}-{phase}",
                )


@pytest.mark.parametrize(("ranks", "configuration", "phase"), cases())
def test_killed_and_started_again_is_the_straight_run(
    ranks: int, configuration: str, phase: str, straight: Any, tmp_path: Path
) -> None:
    # Only the first rank commits a checkpoint; elsewhere the last one dies, and the others notice.
    victim = 0 if phase == "checkpoint-commit" else ranks - 1
    more = CONFIGURATIONS[configuration]
    fault = f"kill:rank={victim}:step={FATAL_STEP.get(configuration, 7)}:phase={phase}"
    codes, log = killed_run.run(tmp_path, "run", ranks, more, fault)
    assert codes[victim] == -signal.SIGKILL, log
    assert f"rank {victim} dies at step" in log
    assert 0 not in codes, "no rank takes a run for finished that has lost one"
    codes, log = killed_run.run(tmp_path, "run", ranks, more)
    assert codes == [0] * ranks, log
    assert "resuming at step" in log
    for expected, found in zip(
        straight(configuration, ranks), killed_run.left(tmp_path, "run", ranks), strict=True
    ):
        assert found["step"] == expected["step"] == STEPS.get(configuration, killed_run.STEPS)
        assert found["meta"] == expected["meta"]
        widths = [int(part.sum()) for part in expected["tensors"]["s"].split([12, 24])]
        assert configuration != "probe" or widths != [5, 9], "they have moved"
        assert found["tensors"].keys() == expected["tensors"].keys()
        differing = [n for n, t in expected["tensors"].items() if not torch.equal(found["tensors"][n], t)]
        assert not differing
