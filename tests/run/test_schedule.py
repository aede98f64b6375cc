"""The learning rate over a run."""

from __future__ import annotations

import itertools

import pytest

from offload_sparse.engine.config import OptimConfig
from offload_sparse.run.schedule import learning_rate


def rates(config: OptimConfig, total: int = 100) -> list[float]:
    return [learning_rate(config, step, total, steps_per_epoch=10) for step in range(total)]


def test_warm_up_rises_linearly_to_the_peak_and_the_cosine_falls_to_zero() -> None:
    found = rates(OptimConfig(lr=0.2, warmup_epochs=2.0))
    assert found[:20] == pytest.approx([0.2 * (i + 1) / 20 for i in range(20)])
    assert found[20] == pytest.approx(0.2)
    assert found[60] == pytest.approx(0.1)
    assert 0 < found[-1] < 0.001
    assert all(a > b for a, b in itertools.pairwise(found[20:]))


@pytest.mark.parametrize("epochs", [0.05, 0.15, 1.99])
def test_a_warm_up_of_part_of_a_step_does_not_pass_the_peak(epochs: float) -> None:
    assert max(rates(OptimConfig(lr=0.2, warmup_epochs=epochs))) == 0.2


def test_a_cycle_of_a_search_is_not_all_warm_up() -> None:
    """A probe compares networks whose rate has come down, however long the warm-up of the run is."""
    for warmup, takes in ((0.5, 5), (2.0, 20), (50.0, 25)):
        config = OptimConfig(lr=0.2, warmup_epochs=warmup)
        found = [learning_rate(config, step, 100, 10, cycle=True) for step in range(100)]
        assert found.index(max(found)) == takes - 1
        assert found[-1] < 0.001


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up() -> None:
    assert set(rates(OptimConfig(lr=0.2, schedule="constant"))) == {0.2}


def test_steps_down_happen_at_the_milestones() -> None:
    found = rates(OptimConfig(lr=0.2, schedule="step", milestones=[4, 6.5]))
    assert found[:40] == [0.2] * 40
    assert found[40:65] == pytest.approx([0.02] * 25)
    assert found[65:] == pytest.approx([0.002] * 35)


def test_milestones_are_epochs_of_the_run_wherever_a_cycle_begins() -> None:
    config = OptimConfig(lr=0.2, schedule="step", milestones=[4])
    found = [learning_rate(config, step, 75, 10, cycle=True, before=25) for step in range(75)]
    assert found == pytest.approx([0.2] * 15 + [0.02] * 60)
