"""Every method on a simulated CUDA device: the bits of the CPU, and no step that waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from offload_sparse.config.run import MethodName, RunConfig
from offload_sparse.engine.config import RoundConfig
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.weight_masks import rigl
from offload_sparse.policy.config import PolicyConfig
from tests.methods.tasks import Batch, batches, make_task
from tests.support.simulated_cuda import DEVICE, simulated_cuda

K, STEPS = 4, 8


class ShortCycles(PolicyConfig):
    cycle_steps = 20


SAMPLED, PROBED = PolicyConfig(rho=0.5, search="sampled"), ShortCycles(rho=0.5, search="probe")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigl, "INTERVAL", 2)


def trained(
    method: Any, device: torch.device, waits: list[Any], policy: PolicyConfig = SAMPLED, steps: int = STEPS
) -> dict[str, Tensor]:
    """After ``steps`` steps: losses, logits and the final network; within a round nothing is waited for."""
    config = RunConfig(method=method, policy=policy, round=RoundConfig(k=K, freeze_at=0.5))
    network = build_method(replace(make_task(config, steps), device=device))
    data: list[Batch] = [(x.to(device), y.to(device)) for x, y in batches(steps)]
    for number, batch in enumerate(data):
        before = len(waits)
        network.train_step(batch, 0.05)
        of_main = [wait for wait in waits[before:] if wait[-1] == "MainThread"]
        assert not of_main or number % K in (0, K - 1), "in the middle of a round"
    losses = torch.tensor([record.loss for record in network.records()])
    images = [x for x, _ in data[:2]]
    with network.evaluation(images) as module:
        logits = module(images[0])
    final = network.finalize(images).module
    network.close(False)
    found = {"losses": losses, "logits": logits, **final.state_dict()}
    return {name: value.detach().to("cpu") for name, value in found.items()}


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method_ends_with_the_bits_of_the_cpu(method: str) -> None:
    assert_bits_of_the_cpu(method, SAMPLED, STEPS)


def test_so_does_a_search_by_probes() -> None:
    found = assert_bits_of_the_cpu("sparse_offload", PROBED, 80)
    even = trained("sparse_offload", torch.device("cpu"), [], replace(PROBED, search="none"), 1)
    moved = [name for name, value in even.items() if name != "losses" and found[name].shape != value.shape]
    assert moved, "widths have moved"


def assert_bits_of_the_cpu(method: Any, policy: PolicyConfig, steps: int) -> dict[str, Tensor]:
    expected = trained(method, torch.device("cpu"), [], policy, steps)
    with simulated_cuda() as simulation:
        found = trained(method, DEVICE, simulation.waits, policy, steps)
        assert not simulation.wrong_device
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    return found
