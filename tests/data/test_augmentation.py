"""Crops and flips: torchvision's own, drawn by (seed, epoch, image) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from offload_sparse.data.augmentation import augment, draw


@given(
    st.integers(0, 2**62),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_batch_is_augmented_as_torchvision_augments_each_image(
    seed: int, channels: int, height: int, width: int, padding: int, flip: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, channels, height, width), dtype=torch.uint8, generator=generator)
    draws = draw(seed, 0, torch.arange(5), padding)
    for image, out, top, left, mirrored in zip(
        images, augment(images, draws, padding, flip), *(field.tolist() for field in draws), strict=True
    ):
        expected = F.crop(F.pad(image, [padding]), top, left, height, width)
        assert torch.equal(out, F.horizontal_flip(expected) if flip and mirrored else expected)


@given(st.integers(0, 2**62), st.integers(0, 100), st.permutations(range(20)))
def test_what_happens_to_an_image_does_not_depend_on_its_batch(
    seed: int, epoch: int, order: list[int]
) -> None:
    indices = torch.tensor(order)
    together = draw(seed, epoch, indices, 4)
    for position, index in enumerate(order):
        alone = draw(seed, epoch, torch.tensor([index]), 4)
        assert [int(field[0]) for field in alone] == [int(field[position]) for field in together]


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    count, padding = 90_000, 1
    top, left, flip = draw(3, 7, torch.arange(count), padding)
    cells = (top * 3 + left) * 2 + flip.long()
    observed = cells.bincount(minlength=18).double()
    expected = count / 18
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 45, "the 99.98 % point of 17 degrees of freedom"


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_seed_and_epoch_change_the_draws(seed: int, epoch: int) -> None:
    here, there = draw(0, 0, torch.arange(2000), 4), draw(seed, epoch, torch.arange(2000), 4)
    assert (here.top == there.top).double().mean().item() == pytest.approx(1 / 9, abs=0.04)
    assert (here.flip == there.flip).double().mean().item() == pytest.approx(1 / 2, abs=0.06)


def test_without_padding_and_flips_images_stay_what_they_are() -> None:
    images = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    assert torch.equal(augment(images, draw(0, 0, torch.arange(4), 0), 0, False), images)
