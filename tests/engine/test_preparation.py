"""A store starts from the model's own initialisation, whichever way it gets there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from offload_sparse.engine.preparation import prepare
from offload_sparse.store.initialisation import build_seeded, named_tensors
from offload_sparse.store.weight_store import WeightStore
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet


def orthogonal() -> nn.Module:
    """An initialisation that no recording can replay."""
    net = SmallNet()
    nn.init.orthogonal_(net.head.weight)
    return net


vgg = partial(build_model, "offload_sparse/vgg_small", in_channels=2, image_size=16)


@pytest.mark.parametrize(("factory", "replayed"), [(vgg, True), (SmallNet, True), (orthogonal, False)])
def test_the_store_holds_what_the_seeded_constructor_gives(
    factory: Callable[[], nn.Module], replayed: bool
) -> None:
    prepared = prepare(factory, (torch.empty(1, 2, 16, 16, device="meta"),), "coupled", verify=False)
    assert prepared.recording is not None
    assert prepared.recording.replayable == replayed
    store = WeightStore(prepared.channel_map, *prepared.tensor_names())
    prepared.fill(store, seed=11)
    for name, value in named_tensors(build_seeded(factory, 11)).items():
        found = store.own_rows(name) if value.is_floating_point() else store.integer_buffers[name]
        assert torch.equal(found.view(value.shape), value), name


def test_a_model_with_values_of_its_own_starts_from_them() -> None:
    net = SmallNet()
    prepared = prepare(net, (torch.empty(1, 2, 16, 16),), "coupled")
    store = WeightStore(prepared.channel_map, *prepared.tensor_names())
    prepared.fill(store, seed=0)
    assert torch.equal(store.own_rows("conv1.weight"), net.conv1.weight)


def test_a_model_with_computed_weights_is_prepared_after_it_has_run() -> None:
    """Such a weight is part of a graph then, which cannot be copied."""
    first, images = nn.utils.spectral_norm(nn.Conv2d(2, 4, 1)), torch.randn(2, 2, 8, 8)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    net(images)
    assert prepare(net, (images,), "coupled").channel_map.num_atoms == 6


def test_a_model_that_cannot_be_narrowed_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match="0 meets pixel_shuffle in 1"):
        prepare(net, (torch.empty(1, 2, 16, 16),), "coupled")
