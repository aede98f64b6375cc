"""Decoding: exact pixels, cached or not, grey or RGB, resized or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.source import load_splits
from tests.support.constants import configured
from tests.workloads.data.images import parquet_folder, pixels, table, write_parquet


def image_set(folder: Path, channels: int | None = None, **settings: int) -> ImageSet:
    config = configured(DataConfig, name=str(folder), **settings)
    return ImageSet(load_splits(config).train, config, channels)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_that_were_encoded(tmp_path: Path, cache_bytes: int, channels: int) -> None:
    images = image_set(parquet_folder(tmp_path, channels=channels), cache_bytes=cache_bytes)
    expected = torch.from_numpy(np.stack(pixels(12, channels=channels)).reshape(12, 8, 8, channels))
    order = torch.tensor([7, 0, 0, 11])
    got = images.gather(order)
    assert got.dtype == torch.uint8
    assert torch.equal(got, expected.permute(0, 3, 1, 2)[order])
    assert images.cached == (cache_bytes > 0)
    assert (images.channels, images.height, images.width, len(images)) == (channels, 8, 8, 12)


def test_the_cache_takes_a_split_of_just_its_size(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path)
    assert image_set(folder, cache_bytes=12 * 64).cached
    assert not image_set(folder, cache_bytes=12 * 64 - 1).cached


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_grey_images_are_repeated_for_a_network_of_three_channels(tmp_path: Path, cache_bytes: int) -> None:
    folder = parquet_folder(tmp_path)
    grey, colour = image_set(folder), image_set(folder, channels=3, cache_bytes=cache_bytes)
    everything = torch.arange(12)
    assert torch.equal(colour.gather(everything), grey.gather(everything).repeat(1, 3, 1, 1))
    assert colour.channels == 3


def test_colour_images_are_not_made_grey(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build it with 3 channels"):
        image_set(parquet_folder(tmp_path, channels=3), channels=1)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_mixed_sizes_need_an_image_size(tmp_path: Path, cache_bytes: int) -> None:
    mixed = pixels(2, 8, 8) + pixels(2, 8, 9)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", table(mixed, [0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"differ in size \(8×8 and 8×9 pixels\); set data\.image_size"):
        image_set(tmp_path, cache_bytes=cache_bytes).gather(torch.arange(4))
    resized = image_set(tmp_path, image_size=4, cache_bytes=cache_bytes)
    assert resized.gather(torch.arange(4)).shape == (4, 1, 4, 4)


def test_resizing_scales_the_shorter_side_and_keeps_the_middle(tmp_path: Path) -> None:
    """A wide image of three flat thirds: only the middle third is left."""
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16], wide[:, 16:] = 100, 200
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", table([wide], [0]))
    middle = image_set(tmp_path, image_size=4).gather(torch.tensor([0]))
    assert middle.shape == (1, 1, 4, 4)
    assert (middle[..., 1:3] == 100).all()


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path)
    everything = torch.arange(12)
    assert torch.equal(
        image_set(folder, image_size=8).gather(everything), image_set(folder).gather(everything)
    )


def test_palettes_and_transparency_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    colour = Image.fromarray(pixels(1, channels=3)[0])
    colour.quantize(256).save(tmp_path / "train" / "a" / "0.png")
    colour.convert("RGBA").save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    images = image_set(tmp_path).gather(torch.arange(2))
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images[1], torch.from_numpy(np.asarray(colour).copy()).permute(2, 0, 1))
