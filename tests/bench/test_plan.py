"""The plan is right: against exact accounting of what a session allocates."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload_sparse.bench import plan
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


@pytest.mark.usefixtures("_quiet")
def test_garbage_of_the_construction_is_not_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Circles that the construction leaves, and that are collected at some time while the session trains."""
    build, train = plan.build_session, plan.train

    def build_and_leave(config: Any) -> Any:
        circle = SimpleNamespace(tensor=torch.zeros(1 << 20))
        circle.itself = circle
        return build(config)

    def collect_and_train(config: Any, session: Any) -> None:
        gc.collect()
        train(config, session)

    monkeypatch.setattr(plan, "build_session", build_and_leave)
    monkeypatch.setattr(plan, "train", collect_and_train)
    config = CASES["local"]
    gc.disable()
    try:
        found = measure_allocated(config)["device"]
    finally:
        gc.enable()
    assert found == pytest.approx(predict(config)["device"], rel=0.05)
