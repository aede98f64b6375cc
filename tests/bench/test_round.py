"""The round bench times rounds of both sides, on networks of the same widths."""

from __future__ import annotations

from functools import partial

import torch

from offload_sparse.bench.round import independent_copy, measure, narrow_round
from offload_sparse.engine.config import OptimConfig
from offload_sparse.workloads.models import build_model


def test_every_round_that_counts_is_timed() -> None:
    factory = partial(build_model, "offload_sparse/vgg_small", 10, 3, 8, width=0.25)
    batch = (torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    ours, narrow = measure(factory, batch, k=3, rounds=2, device=torch.device("cpu"))
    assert len(ours) == len(narrow) == 2
    assert min(*ours, *narrow) > 0


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
