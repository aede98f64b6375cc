"""The bench of the input measures loaders that deliver what they say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from offload_sparse.bench import input as bench


def test_every_loader_delivers_batches_of_the_same_images(tmp_path: Path) -> None:
    size = bench.write_photographs(tmp_path / "images", bench._BATCH)
    assert 20_000 < size < 200_000, "a photograph of this size"
    for name, batches in bench.contenders(tmp_path).items():
        batch = next(batches)
        images, labels = batch if name == "torchvision" else batch.batch[:2]
        side = 256 if name == "cached" else 224
        assert images.shape == (bench._BATCH, 3, side, side), name
        assert images.dtype == (torch.float32 if name == "torchvision" else torch.uint8)
        assert sorted(labels.tolist()) == sorted(i % 4 for i in range(bench._BATCH))


def test_the_spectrum_of_an_image_falls_as_that_of_photographs() -> None:
    grey = np.asarray(bench.photograph(0).convert("L"), dtype=np.float64)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    rows, columns = (np.fft.fftfreq(n) for n in grey.shape)
    radius = np.hypot(rows[:, None], columns[None])
    low, high = (power[(radius > r) & (radius < 1.2 * r)].mean() for r in (0.02, 0.2))
    assert 50 < low / high < 200, "a tenth of the frequency, a hundred times the power"


def test_rates_are_images_of_a_batch_per_second_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 0.5)
    monkeypatch.setattr(bench.time, "process_time", lambda: next(ticks))
    rates = bench._rates({"a": iter(range(9)), "b": iter(range(9))}, turns=2)
    assert rates == {"a": 2 * bench._BATCH, "b": 2 * bench._BATCH}
