"""Masked methods on two ranks: the weights, thresholds and masks of one process on the same global batch."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.config.methods import DFBSTConfig, DSTConfig
from offload_sparse.config.run import RunConfig
from offload_sparse.methods.weight_masks import rigl
from tests.methods.tasks import batches, make_method
from tests.support.ranks import run_ranks

METHODS = ("dst", "dfbst", "rigl", "grow_efficient")


def trained(method: str) -> dict[str, Tensor]:
    """The state after eight steps on this rank's part of each batch."""
    config = RunConfig(
        method=cast(Any, method),
        dst=DSTConfig(alpha=5e-2),
        dfbst=DFBSTConfig(beta=50.0),
    )
    network = make_method(config, frozen_batch_norm=True)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for images, labels in batches(8):
        part = slice(rank * len(labels) // world_size, (rank + 1) * len(labels) // world_size)
        network.train_step((images[part], labels[part]), 0.05)
    losses = torch.tensor([record.loss for record in network.records()])
    state = network.state()
    assert state is not None
    return state.replicated | {"losses": losses}


def all_trained() -> list[dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rigl, "INTERVAL", 3)
        patch.setattr(rigl, "FRACTION", 0.5)
        return [trained(method) for method in METHODS]


def test_two_ranks_train_what_one_process_trains() -> None:
    alone = all_trained()
    first, second = run_ranks(2, all_trained)
    for method, expected, left, right in zip(METHODS, alone, first, second, strict=True):
        assert expected.keys() == left.keys() == right.keys()
        for name, value in expected.items():
            assert torch.equal(left[name], right[name]), f"{method}: ranks differ in {name}"
            torch.testing.assert_close(left[name], value, rtol=1e-8, atol=1e-9, msg=f"{method} {name}")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_a_gpu(method: str) -> None:
    """Not yet run on a GPU: the same steps as on the CPU."""
    import dataclasses

    from offload_sparse.methods.catalogue import build_method
    from tests.methods.tasks import make_task

    device = torch.device("cuda")
    config = RunConfig(method=cast(Any, method))
    states = []
    for place in (device, torch.device("cpu")):
        network = build_method(dataclasses.replace(make_task(config), device=place))
        for images, labels in batches(4):
            network.train_step((images.to(place), labels.to(place)), 0.05)
        states.append(torch.tensor([record.loss for record in network.records()]))
    torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=1e-8)
