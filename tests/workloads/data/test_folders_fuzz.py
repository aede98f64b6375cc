"""Fifty folders of damaged and misleading data: read, or refused in one line; no hang, no writing, bounded
memory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.loader import EvalLoader, TrainLoader
from offload_sparse.workloads.data.source import load_splits
from tests.support.hostile_files import bounded
from tests.workloads.data.jpegs import write_folder, write_shards


def truncate(folder: Path, generator: random.Random) -> None:
    file = _any(folder, generator)
    file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])


def flip_bits(folder: Path, generator: random.Random) -> None:
    file = _any(folder, generator)
    content = bytearray(file.read_bytes())
    for _ in range(20):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def replace_by_noise(folder: Path, generator: random.Random) -> None:
    _any(folder, generator).write_bytes(generator.randbytes(generator.randrange(3000)))


def replace_by_a_pipe(folder: Path, generator: random.Random) -> None:
    file = _any(folder, generator)
    file.unlink()
    os.mkfifo(file)


def replace_by_a_link(folder: Path, generator: random.Random) -> None:
    file = _any(folder, generator)
    file.unlink()
    file.symlink_to(generator.choice(["/dev/zero", "..", "/proc/self/mem", "gone", str(folder), "/"]))


def link_a_folder(folder: Path, generator: random.Random) -> None:
    places = [place for place in folder.rglob("*") if place.is_dir() and not place.is_symlink()] or [folder]
    target = generator.choice([folder, *places])
    (generator.choice(places) / f"link{generator.randrange(99)}").symlink_to(target)


def claim_to_be_huge(folder: Path, generator: random.Random) -> None:
    Image.new("1", (20_000, 20_000)).save(_any(folder, generator), "PNG")


def rename(folder: Path, generator: random.Random) -> None:
    file = _any(folder, generator)
    names = ["caf\udce9.png", "a\nb.jpg", ".hidden.png", "x" * 250 + ".png", "image.eps", "x.png.gz"]
    file.rename(file.with_name(generator.choice(names)))


def put_a_listing(folder: Path, generator: random.Random) -> None:
    rows = ["path,label,split", "/dev/zero,a,train", "../..,b,test", "\udce9,c,train", ",,", "a,b,c,d"]
    text = "\n".join(generator.sample(rows, generator.randrange(1, 6)))
    (folder / generator.choice(["train.csv", "test.csv", "train.jsonl", "train.tar"])).write_text(
        text, errors="surrogateescape"
    )


def remove(folder: Path, generator: random.Random) -> None:
    place = generator.choice([place for place in folder.rglob("*") if not place.is_symlink()] or [folder])
    shutil.rmtree(place) if place.is_dir() else place.unlink()


CHANGES = (
    truncate,
    flip_bits,
    replace_by_noise,
    replace_by_a_pipe,
    replace_by_a_link,
    link_a_folder,
    claim_to_be_huge,
    rename,
    put_a_listing,
    remove,
)


def _any(folder: Path, generator: random.Random) -> Path:
    files = sorted(file for file in folder.rglob("*.*") if file.is_file() and not file.is_symlink())
    if not files:
        files = [folder / "only.png"]
        files[0].write_bytes(b"\x89PNG")
    return generator.choice(files)


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n < 20 else pytest.mark.slow) for n in range(50)]
)
def test_a_damaged_folder_is_read_or_refused_in_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    generator = random.Random(number)
    folder = tmp_path / "data"
    (write_folder if number % 3 else write_shards)(folder, train=12, test=6)
    done = [generator.choice(CHANGES) for _ in range(generator.randrange(1, 5))]
    for change in done:
        if folder.is_dir():
            change(folder, generator)
    before = snapshot(tmp_path / "data")
    config = DataConfig(name=str(folder), image_size=16, batch_size=2, streaming=number % 2 == 0)
    try:
        with bounded():
            splits = load_splits(config)
            batch = next(TrainLoader(splits.train, config).batches())
            assert batch.images.shape[2:] == (16, 16)
            images = (batch.images.float() for batch in EvalLoader(splits.test, config))
            assert all(torch.isfinite(values).all() for values in images)
            assert max(map(len, splits.describe())) < 200
    except ValueError as error:
        text = str(error)
        assert "\n" not in text, json.dumps([change.__name__ for change in done])
        assert len(text) < 1000
        text.encode()  # can be printed
    assert snapshot(tmp_path / "data") == before
