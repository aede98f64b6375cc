"""Crops and flips: torchvision's own, drawn by (seed, epoch, image) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.augmentation import Box, augment, draw, image_keys, random_parts
from offload_sparse.workloads.data.loader import TrainLoader
from offload_sparse.workloads.data.order import global_batch
from offload_sparse.workloads.data.source import load_splits
from tests.support.constants import configured
from tests.workloads.data.jpegs import write_folder


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


# Random resized crops


def parts(height: int, width: int, count: int = 4000, seed: int = 0) -> list[Box]:
    crop = random_parts(image_keys(seed, 0, torch.arange(count)))
    return [crop(position, height, width) for position in range(count)]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**63 - 1))
def test_a_random_part_lies_in_the_image(height: int, width: int, key: int) -> None:
    top, left, h, w = random_parts(np.array([key], dtype=np.uint64))(0, height, width)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


@pytest.mark.parametrize(("height", "width"), [(240, 320), (500, 90), (60, 400)])
def test_random_parts_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov tests of area, aspect ratio and position; the seeds are fixed."""
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    reference = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(224), [image]) for _ in range(4000)]
    expected = [Box(p["top"], p["left"], p["height"], p["width"]) for p in reference]
    found = parts(height, width)
    measures = {
        "area": lambda box: box.height * box.width,
        "aspect": lambda box: box.width / box.height,
        "top": lambda box: box.top,
        "left": lambda box: box.left,
    }
    for name, measure in measures.items():
        test = ks_2samp([measure(box) for box in found], [measure(box) for box in expected])
        assert test.pvalue > 1e-3, name


def test_an_image_too_long_for_any_part_gives_its_middle() -> None:
    """As in torchvision."""
    assert set(parts(10, 1000, count=5)) == {Box(0, 493, 10, 13)}
    assert set(parts(1000, 10, count=5)) == {Box(493, 0, 13, 10)}


def test_a_random_part_depends_on_the_image_and_the_epoch() -> None:
    def part(epoch: int, *rows: int) -> Box:
        return random_parts(image_keys(7, epoch, torch.tensor(rows)))(len(rows) - 1, 100, 120)

    assert part(3, 5) == part(3, 2, 5), "whatever batch it is in"
    others = {part(epoch, 5) for epoch in range(20)}
    assert len(others) == 20


def test_a_batch_of_random_parts_is_scaled_as_torchvision_scales_them(tmp_path: Path) -> None:
    """Bit-equal to ``resized_crop`` with antialiasing and ``hflip``, given the same draws."""
    config = configured(
        DataConfig,
        name=str(write_folder(tmp_path)),
        image_size=16,
        train_crop="resized",
        random_flip=True,
        batch_size=24,
        cache_bytes=0,
    )
    split = load_splits(config).train
    batch = next(TrainLoader(split, config, seed=9).batches())
    indices = global_batch(9, 0, 0, 24, 24)
    crop, flips = random_parts(image_keys(9, 0, indices)), draw(9, 0, indices, 0).flip
    for position, index in enumerate(indices.tolist()):
        (image,) = split.decode([index])
        pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
        box = crop(position, image.height, image.width)
        expected = v2.functional.resized_crop(pixels, *box, [16, 16], antialias=True)
        expected = v2.functional.hflip(expected) if flips[position] else expected
        assert torch.equal(batch.images[position], expected)
    assert 0 < int(flips.sum()) < 24
