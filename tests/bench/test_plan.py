"""The plan is right: against exact accounting of what a session allocates."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from offload_sparse.bench.plan import measure_allocated, predict
from tests.support.planned_runs import CASES


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "name", [n if n != "depthwise" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_predicted_device_bytes_are_those_allocated(name: str) -> None:
    """Exact: every tensor that torch allocates in two rounds, on a CPU, whose allocator rounds nothing."""
    config = CASES[name]
    assert measure_allocated(config)["device"] == pytest.approx(predict(config)["device"], rel=0.05)
