"""The skeleton of a subnet is bound to one selection after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import Subnet, build_on_meta, hollow_copy, narrow_module

IMAGES = (torch.randn(2, 3, 6, 6),)
CONVOLUTIONS = {
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "grouped": nn.Conv2d(8, 12, 3, groups=4),
    "transposed depthwise": nn.ConvTranspose2d(8, 8, 3, groups=8),
    "transposed grouped": nn.ConvTranspose2d(8, 12, 3, groups=4),
}


def bound(subnet: Subnet, model: nn.Module, channel_map: ChannelMap, mask: torch.Tensor) -> nn.Module:
    selection = Selection(channel_map, mask)
    flat = [selection.take(n, p.detach()).flatten() for n, p in model.named_parameters()]
    subnet.bind(selection, torch.cat(flat), torch.empty(0))
    return subnet.module


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_grouped_convolution_grows_again_after_it_was_one_group(kind: str) -> None:
    convolution = CONVOLUTIONS[kind]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), convolution, nn.Conv2d(convolution.out_channels, 5, 1))
    channel_map = discover(model, IMAGES)
    subnet = Subnet(model, torch.device("cpu"))
    one = torch.arange(channel_map.num_atoms) == 1
    for mask in (one, channel_map.full_mask(), ~one):
        expected = narrow_module(model, channel_map, mask)
        found = bound(subnet, model, channel_map, mask)
        assert found[1].groups == expected[1].groups == int(mask.sum())
        assert repr(found) == repr(expected)
        assert torch.equal(found(*IMAGES), expected(*IMAGES))
    assert convolution.groups == channel_map.num_atoms, "the model is left as it was"


def test_to_fit_a_layer_is_no_step_of_its_spectral_norm() -> None:
    middle = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)).train()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)).train()
    found = discover(model, IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow = narrow_module(model, found, found.full_mask())
    assert narrow[1].parametrizations.training
    for network in (model, narrow):
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_hollow_copy_has_zeros_of_every_type_laid_out_as_others_are() -> None:
    """Some operations take no weights whose entries share one place in memory."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with torch.device("meta"):
            model = nn.Conv2d(3, 4, 2, dtype=dtype)
        weight = hollow_copy(model).weight
        assert torch.equal(weight, torch.zeros(4, 3, 2, 2, dtype=dtype))
        assert weight.is_contiguous()


def test_a_model_that_reads_values_while_it_is_built_is_moved_to_meta() -> None:
    def build() -> nn.Module:
        return nn.Conv2d(1, int(torch.tensor(4).item()), 1)

    assert build_on_meta(build).weight.is_meta
    assert build_on_meta(lambda: nn.Linear(2, 3)).weight.is_meta


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_follows_the_width_before_it(kind: type[nn.RNNBase]) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(3, 8), kind(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.fc(x))[0]

    model, inputs = Sequence(), torch.randn(4, 2, 3)
    channel_map = discover(model, (inputs,))
    subnet = Subnet(model, torch.device("cpu"))
    for mask in (torch.arange(8) < 3, channel_map.full_mask()):
        found, dropped = bound(subnet, model, channel_map, mask), copy.deepcopy(model)
        with torch.no_grad():
            dropped.fc.weight[~mask], dropped.fc.bias[~mask] = 0, 0
        assert found.rnn.input_size == int(mask.sum())
        torch.testing.assert_close(found(inputs), dropped(inputs))
    subnet.release()
    assert all(weight.is_meta for weight in found.rnn._flat_weights), "nothing keeps the weights alive"
