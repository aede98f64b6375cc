"""The host bench tells the launching thread from the one that works beside it."""

from __future__ import annotations

from functools import partial

import torch

from offload_sparse.bench.host import measure
from offload_sparse.workloads.models import build_model


def test_both_threads_are_measured_in_every_way() -> None:
    factory = partial(build_model, "offload_sparse/vgg_small", 10, 3, 8, width=0.5)
    found = measure(factory, torch.empty(1, 3, 8, 8, device="meta"), 2, torch.device("cpu"))
    assert set(found) == {"before", "single channels", "blocks"}
    for way, (main, total) in found.items():
        assert 0 < main <= total
        assert (main == total) == (way == "before"), "a second thread works beside it"
