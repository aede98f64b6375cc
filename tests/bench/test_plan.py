"""The plan is right: against exact accounting of what a session allocates."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.autograd import DeviceType

from offload_sparse.bench import plan
from offload_sparse.bench.plan import measure_allocated, predict
from offload_sparse.config.run import RunConfig
from tests.support.planned_runs import CASES


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def without_threads(config: RunConfig) -> RunConfig:
    """With transfers between the rounds: torch's profiler does not see what another thread allocates."""
    overlaps = config.round.overlaps(on_cuda=False)
    return replace(config, round=replace(config.round, transfer="full")) if overlaps else config


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "name",
    [  # the method, not a session, trains the members of a family
        pytest.param(n, marks=[pytest.mark.slow] if n == "depthwise" else [])
        for n in CASES
        if n != "family"
    ],
)
def test_predicted_device_bytes_are_those_allocated(name: str) -> None:
    """Exact: every tensor that torch allocates in two rounds, on a CPU, whose allocator rounds nothing."""
    config = without_threads(CASES[name])
    assert measure_allocated(config)["device"] == pytest.approx(predict(config)["device"], rel=0.05)


def test_memory_of_a_device_is_none_of_the_hosts() -> None:
    def event(at: int, size: int, device: DeviceType) -> Any:
        values = {"name": "[memory]", "start_ns": at, "nbytes": size, "device_type": device}
        return SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})

    sizes = [(5, DeviceType.CPU), (100, DeviceType.CUDA), (-5, DeviceType.CPU), (3, DeviceType.CPU)]
    events = [event(at, *of_event) for at, of_event in enumerate(sizes)]
    results = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    assert plan._peak(cast(Any, SimpleNamespace(profiler=results))) == 5


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
    config = without_threads(CASES["local"])
    gc.disable()
    try:
        found = measure_allocated(config)["device"]
    finally:
        gc.enable()
    assert found == pytest.approx(predict(config)["device"], rel=0.05)
