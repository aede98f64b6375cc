"""Normalisation: measured or given, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.normalise import Normalise, measure, normalise_for, takes_channels_last
from offload_sparse.workloads.data.source import load_splits
from tests.workloads.data.images import parquet_folder, pixels, table, write_parquet


def image_set(folder: Path, channels: int | None = None) -> ImageSet:
    config = DataConfig(name=str(folder))
    return ImageSet(load_splits(config).train, config, channels)


def test_measured_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    images = image_set(parquet_folder(tmp_path, channels=3))
    scaled = np.stack(pixels(12, channels=3)).astype(np.float64) / 255
    mean, std = measure(images)
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-10)


def test_measuring_stops_at_its_limit(tmp_path: Path) -> None:
    images = image_set(parquet_folder(tmp_path))
    ends = np.stack([pixels(12)[0], pixels(12)[11]]).astype(np.float64) / 255
    assert measure(images, limit=2)[0] == pytest.approx([ends.mean()])


def test_normalised_training_images_have_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    images = image_set(parquet_folder(tmp_path, channels=3))
    out = normalise_for(images, DataConfig(), torch.float64)(images.gather(torch.arange(12)))
    assert out.dtype == torch.float64
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_statistics_are_used_per_channel(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    shape = (1, 3, 1, 1)
    expected = (images.double() / 255 - torch.tensor(mean).double().view(shape)) / torch.tensor(
        std
    ).double().view(shape)
    out = Normalise(mean, std, dtype)(images)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, atol=1e-6)


class Viewed(nn.Sequential):
    """Flattens its features with ``view``, which wants channels that come first: always, or in one mode."""

    def __init__(self, when: tuple[bool, ...]) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self._when = when

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        flat = features.view(len(x), -1) if self.training in self._when else features.flatten(1)
        return flat.sum(1)


@pytest.mark.parametrize("when", [(), (True,), (False,), (True, False)])
def test_channels_come_last_for_networks_that_compute_so(when: tuple[bool, ...]) -> None:
    assert takes_channels_last(Viewed(when).to("meta"), (3, 8, 8)) is (not when)


def test_the_order_in_memory_changes_no_value() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    first, last = (Normalise([0.1], [0.4], channels_last=last)(images) for last in (False, True))
    assert torch.equal(first, last)
    assert first.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_float_images_are_left_unchanged_for_the_caller() -> None:
    images = torch.full((1, 1, 2, 2), 51.0)
    assert torch.allclose(Normalise([0.0], [0.5])(images), torch.full((1, 1, 2, 2), 0.4))
    assert torch.equal(images, torch.full((1, 1, 2, 2), 51.0))


def test_one_value_serves_every_channel(tmp_path: Path) -> None:
    """And the statistics of a grey image all of its repeated channels."""
    images = image_set(parquet_folder(tmp_path), channels=3)
    given = normalise_for(images, DataConfig(mean=[0.5], std=[0.25]))
    assert given.mean.flatten().tolist() == [0.5] * 3
    measured = normalise_for(images, DataConfig(std=[0.25]))
    assert len(set(measured.mean.flatten().tolist())) == 1
    assert measured.std.flatten().tolist() == [0.25] * 3


@pytest.mark.parametrize("settings", [{"mean": [0.5, 0.5]}, {"std": [0.5, 0.5]}])
def test_a_list_of_the_wrong_length_is_refused(tmp_path: Path, settings: dict[str, list[float]]) -> None:
    images = image_set(parquet_folder(tmp_path, channels=3))
    with pytest.raises(ValueError, match=r"has 2 values, but the images have 3 channel\(s\)"):
        normalise_for(images, DataConfig(**settings))  # type: ignore[arg-type]


def test_a_deviation_of_zero(tmp_path: Path) -> None:
    """It is refused when it is given and harmless when it is measured."""
    with pytest.raises(ValueError, match=r"data\.std"):
        Normalise([0.0], [0.0])
    flat = [np.full((4, 4), 51, dtype=np.uint8)] * 2
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", table(flat, [0, 1]))
    images = image_set(tmp_path)
    assert normalise_for(images, DataConfig())(images.gather(torch.arange(2))).abs().max() < 1e-6
