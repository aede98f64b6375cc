"""Decoded images in memory-mapped files: the same pixels, built once, whole or not there."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from offload_sparse.store.files import write_file
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data import cache as cache_module
from offload_sparse.workloads.data.augmentation import Box, cut, cut_in_one_call, image_keys, random_parts
from offload_sparse.workloads.data.corrupt import CorruptImages
from offload_sparse.workloads.data.decode import decode_pixels
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.loader import Batch, EvalLoader, TrainLoader
from offload_sparse.workloads.data.source import load_splits
from tests.support.constants import configured
from tests.workloads.data.images import assert_equal
from tests.workloads.data.jpegs import BROKEN, write_folder, write_shards

RECIPE: dict[str, Any] = {"image_size": 16, "batch_size": 8, "cache_bytes": 0, "random_flip": True}


def config_of(folder: Path, **settings: Any) -> DataConfig:
    return configured(DataConfig, name=str(folder / "data"), cache=str(folder / "cache"), **RECIPE | settings)


@pytest.fixture(params=["folder", "shards", "streamed shards"])
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """24 photographs of many sizes; five of them fill a file."""
    monkeypatch.setattr(cache_module, "_FILE_BYTES", 5 * 3 * 16 * 16)
    (write_folder if request.param == "folder" else write_shards)(tmp_path / "data")
    return config_of(tmp_path, streaming=request.param.startswith("streamed"))


def batches(config: DataConfig, write: Any = write_file, **settings: Any) -> list[Batch]:
    loader = TrainLoader(load_splits(config).train, config, write=write, **settings)
    return list(islice(loader.batches(), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_cache_are_those_of_the_files(config: DataConfig, workers: int) -> None:
    expected = batches(config, write=None)
    config.num_workers = workers
    assert_equal(batches(config), expected)
    assert len(list(Path(config.cache).glob("*/*.safetensors"))) == 5


def test_evaluation_reads_the_cache_too(config: DataConfig) -> None:
    config.eval_resize = 20
    split = load_splits(config).test
    (batch,) = EvalLoader(split, config, write=write_file)
    (expected,) = EvalLoader(split, config)
    assert_equal([batch], [expected])


def test_a_cache_is_built_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it serves from a folder that cannot be written, too, as somebody else's."""
    expected = batches(config)
    (lock,) = Path(config.cache).glob("*/lock")
    lock.unlink()
    lock.mkdir()

    def refuse(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("offload_sparse.workloads.data.images.decode_pixels", refuse)
    assert_equal(batches(config, write=refuse), expected)


def test_a_build_that_was_interrupted_goes_on(config: DataConfig) -> None:
    written: list[Path] = []

    def stops(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_file(path, content)

    with pytest.raises(KeyboardInterrupt):
        batches(config, write=stops)
    written.append(Path())  # so that it stops no more
    batches(config, write=stops)
    assert len(set(written)) == len(written) == 1 + 5


@pytest.mark.parametrize("setting", [{"image_size": 12}, {"limit": 20}])
def test_other_pixels_have_files_of_their_own(setting: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    batches(config_of(tmp_path))
    batches(config_of(tmp_path, **setting))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_image_that_changes_is_decoded_anew(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    first = batches(config_of(tmp_path))
    (changed,) = (tmp_path / "data" / "train" / "ant").glob("0000*")
    changed.write_bytes((tmp_path / "data" / "train" / "ant" / "0001.jpg").read_bytes())
    second = batches(config_of(tmp_path))
    assert any(not torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_corrupt_images_are_replaced_and_counted_from_the_cache_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", broken=True)
    expected = batches(config_of(tmp_path), write=None, corrupt=CorruptImages(100))
    for _ in range(2):
        corrupt = CorruptImages(100)
        assert_equal(batches(config_of(tmp_path), corrupt=corrupt), expected)
        assert len(corrupt) == len(BROKEN)


@pytest.mark.parametrize("missing", ["a broken link", "a listed file", "a name that no file can have"])
def test_a_missing_file_is_a_corrupt_image_in_the_cache_too(missing: str, tmp_path: Path) -> None:
    """Until it is there: then the images are others."""
    train = write_folder(tmp_path / "data") / "train"
    file = next((train / "ant").glob("0001*"))
    listed = {path: path.parent.name for path in sorted(train.rglob("*.*g"))}
    kept = file.rename(tmp_path / file.name)
    if missing == "a broken link":
        file.symlink_to(tmp_path / "nowhere")
    else:
        name = "\0" if "name" in missing else ""
        rows = [[f"{path.name}{name if path == file else ''}", label] for path, label in listed.items()]
        for split in ("train", "test"):
            lines = [json.dumps({"path": f"train/{label}/{path}", "label": label}) for path, label in rows]
            (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    uncached = CorruptImages(100)
    expected = batches(config_of(tmp_path), write=None, corrupt=uncached)
    for _ in range(2):
        corrupt = CorruptImages(100)
        assert_equal(batches(config_of(tmp_path), corrupt=corrupt), expected)
        assert len(corrupt) == len(uncached) == 1
    if missing == "a broken link":
        kept.rename(tmp_path / "nowhere")
        corrupt = CorruptImages(100)
        batches(config_of(tmp_path), corrupt=corrupt)
        assert len(corrupt) == 0


def remembering(corrupt: str) -> bytes:
    """A file that is whole, but for what it says of its corrupt images."""
    tensors = {name: torch.zeros(24, dtype=torch.uint8) for name in ("pixels", "shown", "sides")}
    return safetensors.torch.save(tensors, {"corrupt": corrupt})


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"\xff" * 100, *map(remembering, ("7", "[7]", "{", "[" * 100_000))]
)
def test_a_damaged_cache_is_one_line(content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    batches(config_of(tmp_path))
    (file,) = (tmp_path / "cache").glob("*/*.safetensors")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.cache .* cannot be used") as caught:
        batches(config_of(tmp_path))
    assert "\n" not in str(caught.value)


# Random parts, which are cut out of squares


def test_random_parts_of_the_cache_are_those_of_the_images(tmp_path: Path) -> None:
    """The same regions, from images that were scaled to about their final size."""
    write_folder(tmp_path / "data")
    config = config_of(tmp_path, train_crop="resized", image_size=56, batch_size=24, random_flip=False)
    (cached,), (exact,) = ([next(iter(batches(config, write=w)))] for w in (write_file, None))
    assert torch.equal(cached.labels, exact.labels)
    difference = (cached.images.float() - exact.images.float()).abs().mean((1, 2, 3))
    other = (cached.images.float() - exact.images.roll(1, 0).float()).abs().mean((1, 2, 3))
    assert difference.median() < 4 < 20 < other.median()


def test_the_parts_of_squares_cover_what_was_chosen(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    config = config_of(tmp_path, train_crop="resized", image_size=56)
    images = ImageSet(load_splits(config).train, config, training=True, write=write_file)
    indices = torch.arange(24)
    crop = random_parts(image_keys(0, 0, indices))
    parts = images.parts(indices, crop)
    for index, (top, left, height, width) in enumerate(parts.tolist()):
        stored = images._split.stored([index])[0]
        whole = decode_pixels(stored, 3)
        box = crop(index, *whole.shape[1:])
        for begin, length, side, start, extent in (
            (top, height, whole.shape[1], box.top, box.height),
            (left, width, whole.shape[2], box.left, box.width),
        ):
            assert begin <= start * 64 / side < begin + 1
            assert begin + length - 1 < (start + extent) * 64 / side <= begin + length <= 64


@pytest.mark.parametrize("size", [7, 16, 40])
def test_one_call_cuts_as_image_by_image(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (6, 3, 24, 31), dtype=torch.uint8, generator=generator)
    parts = torch.tensor(
        [Box(0, 0, 24, 31), Box(3, 5, 9, 8), Box(23, 30, 1, 1), Box(4, 0, 20, 31)] + [Box(2, 3, 16, 16)] * 2
    )
    difference = cut_in_one_call(images, parts, size).int() - cut(images, parts, size).int()
    assert int(difference.abs().max()) <= 2
    assert float(difference.float().abs().mean()) < 0.15, "other roundings"


@pytest.mark.parametrize("settings", [{"random_crop": 2}, {"train_crop": "resized"}])
def test_what_is_left_to_a_device_gives_the_batches_of_the_host(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """For a device the workers only decode; the rest, done here on the CPU, is the same."""
    write_folder(tmp_path / "data")
    config = config_of(tmp_path, **settings)
    expected = batches(config)
    made = TrainLoader(load_splits(config).train, config, write=write_file)
    for step, batch in enumerate(expected):
        made.device = torch.device("cuda")
        item = made[step]
        assert item.draws is not None
        assert not torch.equal(item.batch.images, batch.images)
        made.device = torch.device("cpu")
        assert_equal([made.finished(item).batch], [batch])
