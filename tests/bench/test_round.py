"""The round bench times every step of both sides, on networks of the same widths."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offload_sparse.bench.round import RoundTimes, independent_copy, measure_model, narrow_round
from offload_sparse.engine.config import OptimConfig
from offload_sparse.workloads.models import build_model


def test_every_step_of_every_round_that_counts_is_timed() -> None:
    factory = partial(build_model, "offload_sparse/vgg_small", 10, 3, 8, width=0.25)
    batch = (torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    times = measure_model(factory, batch, k=3, rounds=2, device=torch.device("cpu"))
    assert [len(steps) for steps in (*times.ours, *times.narrow)] == [3] * 4
    assert times.ratio > 0


def test_the_narrow_pair_trains_in_turns_on_weights_of_its_own() -> None:
    flat = torch.randn(2 * 3)
    views = [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
    for view in views:
        view.weight = torch.nn.Parameter(flat.view(2, 3))
    before = flat.clone()
    copies = [independent_copy(view) for view in views]
    seconds = narrow_round(copies, (torch.randn(4, 3), torch.randint(2, (4,))), 2, OptimConfig())
    assert len(seconds) == 2
    assert torch.equal(flat, before)
    assert all(not torch.equal(copy.weight, flat.view(2, 3)) for copy in copies)
    assert all(copy.weight.untyped_storage().nbytes() == 24 for copy in copies)


def test_the_parts_of_a_round_are_told_apart() -> None:
    times = RoundTimes(ours=[[5.0, 2.0, 2.0, 2.0, 3.0]], narrow=[[1.0] * 5])
    assert times.first == 3.0
    assert times.last == 1.0
    assert times.between == 5.0
    assert times.ratio == pytest.approx(14 / 5)
