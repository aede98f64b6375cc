"""What the tests of runs share: images to train on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image


def png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness: 12x12 grey images as parquet files."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    for split, count in (("train", 96), ("test", 40)):
        labels = [i % 2 for i in range(count)]
        rows = [png(generator.integers(100 * y, 100 * y + 60, (12, 12), dtype=np.uint8)) for y in labels]
        table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    return folder
