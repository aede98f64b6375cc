"""The wide residual network of linear layers."""

from __future__ import annotations

import pytest
import torch

from offload_sparse.channels.accounting import count_parameters
from offload_sparse.channels.check import verify
from offload_sparse.channels.discovery import discover
from offload_sparse.store.initialisation import record
from offload_sparse.workloads.models import build_model
from offload_sparse.workloads.models.mlp import MLP

NAME = "offload_sparse/mlp"


def test_the_network_is_a_stream_that_blocks_add_to() -> None:
    torch.manual_seed(0)
    network = build_model(NAME, stream=6, hidden=10, depth=2).double().eval()
    assert isinstance(network, MLP)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    x = images.flatten(1) @ network.embed.weight.T + network.embed.bias
    for block in network.blocks:
        inner = block.norm1(x) @ block.expand.weight.T
        x = x + block.norm2(inner).clamp(min=0) @ block.contract.weight.T
    expected = network.norm(x) @ network.classifier.weight.T + network.classifier.bias
    assert torch.allclose(network(images), expected, rtol=0, atol=1e-12)


def test_width_multiplies_stream_and_hidden_channels() -> None:
    with torch.device("meta"):
        wide, named = build_model(NAME, width=2.0), build_model(NAME, stream=1024, hidden=4096)
        large = build_model(NAME, in_channels=1, image_size=28, stream=8192, hidden=65536, depth=10)
    assert count_parameters(wide) == count_parameters(named)
    assert count_parameters(large) > 10e9


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        build_model(NAME, depth=0)


def test_its_values_are_replayed_and_both_its_widths_can_be_narrowed() -> None:
    recording = record(lambda: build_model(NAME, stream=8, hidden=12, depth=2))
    assert recording.replayable
    inputs = (torch.empty(2, 3, 32, 32),)
    channel_map = discover(recording.model, inputs, "coupled")
    assert sorted(group.size for group in channel_map.groups) == [8, 12, 12]
    verify(build_model(NAME, stream=8, hidden=12, depth=2), inputs, channel_map)
