"""Images per second and core: torchvision's loader, ours, and ours from the decoded cache.

JPEGs of 500 × 375 pixels, cut and scaled to 224 at random for training, in batches of 64. What is measured is
the CPU time of one core until a batch is ready for a device, in turns. torchvision's batches are normalised
floats; ours are bytes, which the device flips and normalises and, from the cache, cuts and scales. Without a
device the CPU does so (normalising left out): the rows ``all on the CPU``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import one_thread, take_turns
from offload_sparse.store.files import write_file
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.loader import TrainLoader
from offload_sparse.workloads.data.source import load_splits

_WIDTH, _HEIGHT, _SIZE, _BATCH = 500, 375, 224, 64
_QUALITY = 75
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def run(quick: bool) -> BenchResult:
    """256 images and 6 turns with ``quick``, else 1024 and 16."""
    images, turns = (256, 6) if quick else (1024, 16)
    rates, size = measure(images, turns)
    base = rates["torchvision"]
    ratios = {
        "input.vs_torchvision": rates["ours"] / base,
        "input.cached_vs_torchvision": rates["cached"] / base,
        "input.on_cpu_vs_torchvision": rates["ours, all on the CPU"] / base,
        "input.cached_on_cpu_vs_torchvision": rates["cached, all on the CPU"] / base,
    }
    rows = [[name, f"{rate:.0f}", f"{rate / base:.2f}"] for name, rate in rates.items()]
    raw = {"images_per_core_second": rates, "bytes_per_image": size, "quality": _QUALITY, "batch": _BATCH}
    return BenchResult(ratios, raw, ("loader", "images/s and core", "of torchvision"), rows)


def measure(images: int, turns: int) -> tuple[dict[str, float], int]:
    """Images per second of CPU time by loader, over so many images and turns; bytes of an image."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder) / "images", images)
        return _rates(contenders(Path(folder)), turns), size


def contenders(folder: Path) -> dict[str, Iterator[Any]]:
    """Batches without end, by the name of their loader; what is built once is built here."""
    images = str(folder / "images")
    config = partial(
        DataConfig, name=images, image_size=_SIZE, train_crop="resized", random_flip=True, batch_size=_BATCH
    )

    def ours(device: str = "cuda", **settings: Any) -> Iterator[Any]:
        loader = TrainLoader(load_splits(config(**settings)).train, config(**settings), write=write_file)
        # The device's part is left undone, whether or not there is one.
        loader.device = torch.device(device)
        return (loader[step] for step in count())

    return {
        "torchvision": chain.from_iterable(repeat(_torchvision(f"{images}/train"))),
        "ours": ours(),
        "ours, all on the CPU": ours("cpu"),
        "cached": ours(cache=str(folder / "cache")),
        "cached, all on the CPU": ours("cpu", cache=str(folder / "cache")),
    }


def _torchvision(folder: str) -> DataLoader[Any]:
    recipe = [v2.RandomResizedCrop(_SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    recipe += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
    images = torchvision.datasets.ImageFolder(folder, v2.Compose(recipe))
    return DataLoader(images, _BATCH, shuffle=True, drop_last=True)


def _rates(loaders: dict[str, Iterator[Any]], turns: int) -> dict[str, float]:
    """Images per second of CPU time, medians over the turns."""
    passes = {name: partial(next, batches) for name, batches in loaders.items()}
    seconds = take_turns(passes, turns, clock=time.process_time)
    return {name: _BATCH / median(taken) for name, taken in seconds.items()}


def write_photographs(folder: Path, images: int) -> int:
    """Training images in four classes, and a few for testing; the spectrum falls with 1/f as in photographs.
    Returns bytes of an image, the mean."""
    for split, number in (("train", images), ("test", 4)):
        for i in range(number):
            place = folder / split / f"class{i % 4}"
            place.mkdir(parents=True, exist_ok=True)
            photograph(i).save(place / f"{i:05d}.jpg", quality=_QUALITY)
    sizes = [path.stat().st_size for path in (folder / "train").rglob("*.jpg")]
    return round(sum(sizes) / len(sizes))


def photograph(seed: int) -> Image.Image:
    """Noise whose amplitude falls with 1/f, mostly alike in the three colours."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(_HEIGHT)[:, None], np.fft.rfftfreq(_WIDTH)[None])
    frequency[0, 0] = 1
    shape = (4, *frequency.shape)
    waves = (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)) / frequency
    fields = np.fft.irfft2(waves, (_HEIGHT, _WIDTH))
    fields /= fields.std((1, 2), keepdims=True)
    pixels = 118 + 55 * (0.9 * fields[:1] + 0.4 * fields[1:])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
