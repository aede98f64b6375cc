"""The host bench tells apart what the CPU does between two rounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offload_sparse.bench.host import measure, parts_measured
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.workloads.models import build_model

CPU = torch.device("cpu")


def test_every_part_of_a_round_is_measured_in_every_way() -> None:
    factory = partial(build_model, "offload_sparse/vgg_small", 10, 3, 8, width=0.5)
    found = measure(factory, torch.empty(1, 3, 8, 8, device="meta"), 2, CPU)
    assert set(found) == {"before", "single channels", "blocks"}
    for way, spent in found.items():
        assert min(spent[part] for part in ("learn", "sample", "resolve", "bind", "plans", "tables")) > 0
        assert 0 < spent["main"] <= spent["total"]
        assert (spent["main"] == spent["total"]) == (way == "before"), "a second thread works beside it"


def test_what_a_part_calls_of_another_counts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that every call moves."""
    clock = iter(range(100))
    monkeypatch.setattr("offload_sparse.bench.host.time.thread_time", lambda: float(next(clock)))
    monkeypatch.setattr(MaskPolicy, "sample", lambda _: None)
    monkeypatch.setattr(MaskPolicy, "update", lambda policy: policy.sample())
    with parts_measured() as spent:
        MaskPolicy.update(MaskPolicy.__new__(MaskPolicy))
    assert (spent["sample"], spent["learn"]) == (1.0, 2.0)
