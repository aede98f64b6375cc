"""The networks that the step bench compares compute the same thing."""

from __future__ import annotations

import torch

from offload_sparse.bench.step import flat_subnet, measure_network, one_pass
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.workloads.models import build_model


def test_our_subnet_equals_the_hand_made_network() -> None:
    """Outputs and gradients."""
    torch.manual_seed(0)
    dense = build_model("offload_sparse/vgg_small", in_channels=3, image_size=16)
    channel_map = discover(dense, (torch.empty(1, 3, 16, 16),))
    mask = channel_map.uniform_mask(0.25)
    narrow = narrow_module(dense, channel_map, mask)
    ours = flat_subnet(dense, channel_map, mask, torch.device("cpu"))
    batch = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    for network in (narrow, ours):
        one_pass(network, batch)  # which leaves the gradients where they are
    for (name, a), (_, b) in zip(ours.named_parameters(), narrow.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a.grad, b.grad)


def test_figures_are_given_for_every_rho() -> None:
    figures = measure_network("resnet20", (0.1,), 1, torch.device("cpu"))
    assert figures[0.1].keys() == {"dense", "narrow", "subnet", "vs_narrow", "flops_ratio"}
    assert 0 < figures[0.1]["flops_ratio"] < 0.05
