"""Sessions over blocks of channels, transformers and grouped convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.export.network_file import load_pruned, read_structure
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.workloads.models.resnet import ResNet

IMAGES = (torch.zeros(2, 3, 32, 32),)


def transformer() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=5
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(24, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def resnet() -> nn.Module:
    return ResNet((16, 32, 64), 1, num_classes=5)


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("factory", "block"), [(transformer, 1), (transformer, 8), (grouped, 1), (resnet, 8)]
)
def test_a_session_trains_and_exports_a_network_that_can_be_read_back(
    factory: Callable[[], nn.Module], block: int, tmp_path: Path
) -> None:
    session = SparseOffload(
        factory,
        IMAGES,
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        total_steps=6,
        policy=PolicyConfig.paper(rho=0.5, hard_cap=1.0),
        rounds=RoundConfig(k=2, freeze_at=0.7),
        setup=Setup(block=block),
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    batches: list[Any] = [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(6)
    ]
    for batch in batches:
        assert torch.isfinite(session.step(partial(loss, batch=batch)))
    network = session.finalize([batches[0][0]])
    groups = network.channel_map.groups
    assert int(network.mask.sum()) <= max(session.policy.cap, len(groups))
    network.save(tmp_path)
    read = load_pruned(tmp_path, factory)
    x = batches[0][0]
    assert torch.equal(read(x), network.module(x))
    sizes = {name: entry.size for name, entry in read_structure(tmp_path).groups.items()}
    full = factory().state_dict()
    assert sizes == {name: len(full[f"{name}.weight"]) for name in sizes}, "channels, whatever an atom is"


def test_widths_are_multiples_of_the_block() -> None:
    session = SparseOffload(
        resnet, IMAGES, torch.optim.SGD, total_steps=1, setup=Setup(block=8, verify=False), device="cpu"
    )
    first, _ = session.policy.sample(0)
    network = session.finalize([torch.randn(2, 3, 32, 32)])
    assert len(first) == session.channel_map.num_atoms == 224 // 8
    widths = [m.out_channels for m in network.module.modules() if isinstance(m, nn.Conv2d)]
    assert widths
    assert all(width % 8 == 0 for width in widths)
