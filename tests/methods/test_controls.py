"""The narrow control begins with the scale of weights that its own initialisation has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.channels.selection import Selection
from offload_sparse.engine.preparation import prepare
from offload_sparse.methods.controls import narrow_initialised, scale_laws
from offload_sparse.store.initialisation import build_seeded


def convolutions(init: Callable[[Tensor], object] | None, share: float = 1.0) -> nn.Sequential:
    """Weights of different fans, of which some have one in common."""
    widths = [3, *(int(share * width) for width in (64, 64, 128, 128))]
    layers: list[nn.Module] = []
    for number, (reads, gives) in enumerate(pairwise(widths)):
        conv = nn.Conv2d(reads, gives, 3 if number else 7, padding=1)
        if init is not None:
            init(conv.weight)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 100))


def by_hand(weight: Tensor) -> None:
    """Of what reads a weight, as some libraries write it."""
    with torch.no_grad():
        weight.normal_(0, (2.0 / (weight[:, 0].numel())) ** 0.5)


INITIALISATIONS: dict[str, Callable[[Tensor], object] | None] = {
    "of torch": None,
    "fan in": nn.init.kaiming_normal_,
    "fan out": partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "by hand": by_hand,
    "both": nn.init.xavier_normal_,
    "truncated": partial(nn.init.trunc_normal_, std=0.02),
    "a number": partial(nn.init.normal_, std=0.01),
}


@pytest.mark.parametrize("kind", INITIALISATIONS)
def test_a_narrow_control_begins_as_its_own_initialisation_would(kind: str) -> None:
    init = INITIALISATIONS[kind]
    prepared = prepare(partial(convolutions, init), (torch.empty(1, 3, 16, 16),), "coupled", verify=False)
    channel_map, recording = prepared.channel_map, prepared.recording
    assert recording is not None
    laws = scale_laws(recording.draws(), channel_map.shapes)
    half = Selection(channel_map, channel_map.uniform_mask(0.5))
    found = narrow_initialised(prepared.meta_model, recording.replay(0), half, laws)
    own = build_seeded(partial(convolutions, init, 0.5), 1)
    for (name, weight), expected in zip(found.named_parameters(), own.parameters(), strict=True):
        assert weight.shape == expected.shape
        if weight.dim() > 1:
            assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.06), name


def test_trained_values_stay_as_they_are() -> None:
    prepared = prepare(partial(convolutions, None), (torch.empty(1, 3, 16, 16),), "coupled", verify=False)
    assert prepared.recording is not None
    mask = prepared.channel_map.uniform_mask(0.5)
    found = narrow_initialised(
        prepared.meta_model, prepared.recording.replay(0), Selection(prepared.channel_map, mask)
    )
    full = dict(prepared.recording.replay(0))
    assert torch.equal(found.get_parameter("2.weight"), full["2.weight"][:32, :32])
