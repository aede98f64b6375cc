"""Gates on channels: shut means absent, the gradient reaches shut gates, the budget is met."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import RoundConfig
from offload_sparse.methods.weight_masks import grow_efficient
from offload_sparse.methods.weight_masks.grow_efficient import ChannelGates, GrowEfficient
from offload_sparse.methods.weight_masks.sparsity import MaskedNetwork
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.workloads.config import ModelConfig
from offload_sparse.workloads.models import build_model
from tests.methods.tasks import batches, make_method, train


def upsampled() -> nn.Module:
    """With a transposed convolution, which reads along the first dimension of its weight."""
    narrow, wide = nn.Conv2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 12, 2, 2)
    return nn.Sequential(narrow, nn.ReLU(), wide, nn.ReLU(), nn.Conv2d(12, 4, 8), nn.Flatten())


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("vgg_small", 1, 8),
        ("resnet20_cifar", 3, 8),
        ("wrn28_10_cifar", 3, 8),
        ("lenet5_caffe", 1, 28),
        ("upsampled", 3, 8),
    ],
)
def test_shut_gates_leave_the_network_of_the_open_channels(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    if name == "upsampled":
        model = upsampled().double()
    else:
        model = build_model(f"offload_sparse/{name}", 4, channels, size, width=0.1).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    channel_map = discover(model, (torch.empty(1, channels, size, size, dtype=torch.float64),))
    gates = ChannelGates(model, channel_map, RunConfig(), 10)
    with torch.no_grad():
        gates.logits.copy_(torch.randn(channel_map.num_atoms))
    mask = gates.mask()
    images = torch.randn(2, channels, size, size, dtype=torch.float64)
    gated = MaskedNetwork(model, gates).eval()(images)
    narrow = narrow_module(model, channel_map, mask).eval()(images)
    torch.testing.assert_close(gated, narrow, rtol=1e-9, atol=1e-9)
    assert 0 < int(mask.sum()) < len(mask)


CONFIG = RunConfig(
    method="grow_efficient", policy=PolicyConfig(rho=0.3), round=RoundConfig(freeze_at=0.8)
)


def gates_of(method: object) -> ChannelGates:
    assert isinstance(method, GrowEfficient)
    return method.sparsity


def test_shut_gates_get_a_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grow_efficient, "PENALTY", 0.0)
    method = make_method(CONFIG)
    gates = gates_of(method)
    loss, _ = method._task.forward.trained(method.module, partial(method._task.loss_fn, batch=batches(1)[0]))
    loss.backward()
    first = gates.channel_map.groups[0]  # behind a BatchNorm, so no channel is dead by itself
    shut = (gates.gates() == 0)[first.start : first.stop]
    assert 0 < int(shut.sum()) < first.size
    assert gates.logits.grad is not None
    assert gates.logits.grad[first.start : first.stop].all()


def test_the_open_share_goes_to_rho_and_the_gates_then_stand_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("GATE_LR", 0.5), ("SHARPNESS", 10.0), ("PENALTY", 20.0)):
        monkeypatch.setattr(grow_efficient, name, value)
    method = make_method(CONFIG, total_steps=100)
    data = batches(20) * 5
    train(method, data[:80], lr=0.01)
    gates = gates_of(method)
    before = gates.logits.detach().clone()
    share = float(gates.mask().double().mean())
    train(method, data[80:], lr=0.01)
    assert torch.equal(gates.logits, before)
    assert share == pytest.approx(0.3, abs=0.16)


def test_every_group_keeps_an_atom() -> None:
    method = make_method(CONFIG)
    gates = gates_of(method)
    with torch.no_grad():
        gates.logits.fill_(-50.0)
    train(method, batches(2))
    for group in gates.channel_map.groups:
        assert int(gates.mask()[group.start : group.stop].sum()) == 1


def test_the_final_network_is_narrow() -> None:
    method = make_method(CONFIG, frozen_batch_norm=True)
    train(method, batches(3))
    final = method.finalize([])
    report = method.report()
    assert sum(p.numel() for p in final.module.parameters()) == round(
        report["params_ratio"] * method.cost.dense_parameters
    )
    with method.evaluation([]) as network, torch.no_grad():
        images = batches(1)[0][0]
        torch.testing.assert_close(final.module(images), network.eval()(images), rtol=1e-9, atol=1e-9)


def test_a_mask_per_filter_is_refused() -> None:
    config = replace(CONFIG, model=ModelConfig(residual="filter"))
    with pytest.raises(ValueError, match=r"set model\.residual to coupled or internal"):
        make_method(config)
