"""Nothing is taken at face value: depths, transparency, formats, sizes, links, names, labels."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageFile

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data import decode as decode_module
from offload_sparse.workloads.data.decode import UndecodableError, decode, decode_pixels, pixels_of
from offload_sparse.workloads.data.folder import read_image_folder
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.source import Splits, load_splits
from tests.workloads.data.images import png
from tests.workloads.data.jpegs import photograph

RAMP = np.linspace(0, 1, 1024).reshape(32, 32)
DEPTHS = {
    "8 bits": ((RAMP * 255).astype(np.uint8), "png"),
    "16 bits": ((RAMP * 65535).astype(np.uint16), "png"),
    "16 bits, TIFF": ((RAMP * 65535).astype(np.uint16), "tiff"),
    "16 bits, JPEG 2000": ((RAMP * 65535).astype(np.uint16), "jp2"),
}
REFUSED = {
    "32-bit floats": ((RAMP * 1000).astype(np.float32), "tiff"),
    "32-bit integers": ((RAMP * 65535).astype(np.int32), "tiff"),
}


def folder_of(folder: Path, image: Image.Image, ending: str, **options: Any) -> DataConfig:
    """A data set of the same image in two classes."""
    for split in ("train", "test"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            image.save(folder / split / name / f"0.{ending}", **options)
    return DataConfig(name=str(folder), batch_size=1)


def seen(config: DataConfig) -> torch.Tensor:
    """The first training image as the network sees it, uint8[C, H, W]."""
    return ImageSet(load_splits(config).train, config).gather(torch.tensor([0]))[0]


# Depth


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_keeps_its_256_levels(depth: str, tmp_path: Path) -> None:
    values, ending = DEPTHS[depth]
    found = seen(folder_of(tmp_path, Image.fromarray(values), ending))
    assert found.shape == (1, 32, 32)
    assert found.unique().numel() == 256
    assert np.abs(found[0].numpy() - RAMP * 255).max() <= 1
    assert (found == 255).float().mean() < 0.01


@pytest.mark.parametrize("kind", REFUSED)
def test_a_depth_without_a_known_range_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    values, ending = REFUSED[kind]
    config = folder_of(tmp_path, Image.fromarray(values), ending)
    with pytest.raises(ValueError, match=rf"cannot be decoded \(mode [IF] \(.*{kind}\) has no known range"):
        load_splits(config)


def test_a_deep_image_in_parquet_bytes_is_scaled(tmp_path: Path) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [png(values)], "label": [0]}), tmp_path / f"{split}.parquet")  # type: ignore[arg-type]
    assert seen(DataConfig(name=str(tmp_path))).unique().numel() == 256


def test_sixteen_bits_per_colour_are_scaled() -> None:
    """A PNG of 16 bits per colour, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"".join(struct.pack(">HHH", v, v, 65535 - v) for v in range(0, 65536, 257))
    header = struct.pack(">IIBBBBB", 256, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row))
    found = decode_pixels({"bytes": content + chunk(b"IEND", b"")}, 3)
    assert found[0].flatten().tolist() == list(range(256))
    assert found[2].flatten().tolist() == list(range(255, -1, -1))


def tiff(values: np.ndarray, photometric: int, bits: int = 16, orientation: int = 0) -> bytes:
    """A grey TIFF of one row, whose ``bits`` of each value are stored in a 16-bit word or packed; an
    orientation of 0 is left out."""
    data = values.astype("<u2").tobytes()
    if bits == 12:
        number = "".join(f"{value:012b}" for value in values)
        data = int(number, 2).to_bytes(len(number) // 8, "big")
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), *[(274, 3, orientation)] * bool(orientation)]
    tags += [(277, 3, 1), (278, 4, 1), (279, 4, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize("bits", [12, 16])
def test_a_tiff_is_scaled_by_the_bits_that_it_has(bits: int) -> None:
    full = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16)
    assert decode_pixels({"bytes": tiff(full, 1, bits)}, 1).flatten().tolist() == list(range(256))


def test_white_is_zero_in_a_tiff_that_says_so() -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16)
    assert decode_pixels({"bytes": tiff(values, 0)}, 1).flatten().tolist() == list(range(255, -1, -1))


@pytest.mark.parametrize(("photometric", "bits"), [(0, 16), (1, 12)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_orientation_turns_a_tiff_and_changes_no_shade(
    orientation: int, photometric: int, bits: int
) -> None:
    values = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16)
    lying = decode_pixels({"bytes": tiff(values, photometric, bits)}, 1)
    turned = decode_pixels({"bytes": tiff(values, photometric, bits, orientation)}, 1)
    assert torch.equal(turned, lying.rot90({1: 0, 3: 2, 6: -1}[orientation], (1, 2)))


# What the pixels mean


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = photograph(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "0.jpg", quality=95, exif=exif)
    image.save(tmp_path / "1.jpg", quality=95)
    turned, lying = (decode_pixels({"path": str(tmp_path / f"{i}.jpg")}, 3) for i in range(2))
    assert torch.equal(turned, lying.rot90(-1, (1, 2)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode: str, tmp_path: Path) -> None:
    """A drawing of black strokes on nothing, stored as black throughout."""
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (0, 0, 0, 255))
    drawing = drawing.quantize() if mode == "P" else drawing.convert(mode)
    drawing.save(tmp_path / "0.png")
    found = decode_pixels({"path": str(tmp_path / "0.png")}, 3)
    assert found[:, 1, 1].tolist() == [0, 0, 0]
    assert int((found == 255).sum()) == 3 * 15


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_counts(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:], **options)
    found = decode_pixels({"path": str(tmp_path / f"0.{ending}")}, 3)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]


def test_cmyk_and_ycbcr_become_rgb(tmp_path: Path) -> None:
    colour = Image.new("RGB", (8, 8), (200, 30, 60))
    colour.convert("CMYK").save(tmp_path / "0.jpg", quality=100)
    colour.convert("YCbCr").save(tmp_path / "0.tiff")
    for name in ("0.jpg", "0.tiff"):
        found = decode_pixels({"path": str(tmp_path / name)}, 3).float()
        assert (found.flatten(1).mean(1) - torch.tensor([200.0, 30.0, 60.0])).abs().max() < 4


def _exif(orientation: int | None) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    return exif


JPEGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "whole colours": {"subsampling": 0},
    "as RGB": {"keep_rgb": True},
    "with EXIF data": {"exif": _exif(None)},
    "upright": {"exif": _exif(1)},
    "turned": {"exif": _exif(6)},
    "with XMP": {"xmp": b"<x/>"},
    "turned by XMP": {"xmp": b'<x tiff:Orientation="8"/>'},
}


def _jpeg(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    photograph(0).resize((37, 23)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def _or_none(read: Callable[[], torch.Tensor]) -> list[Any] | None:
    """The pixels, or None if there are none."""
    try:
        return read().tolist()
    except UndecodableError:
        return None


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_has_the_pixels_that_pillow_gives(kind: str) -> None:
    stored = {"bytes": _jpeg(**JPEGS[kind])}
    assert torch.equal(decode_pixels(stored, 3), pixels_of(decode(stored), 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_pillow_refuses_of_a_broken_jpeg_is_refused(mode: str) -> None:
    """Wherever it is cut off, and whatever its header says in place of a byte."""
    whole = _jpeg(mode, quality=20)
    header = whole.index(b"\xff\xda")
    cut = [whole[:length] for length in range(1, len(whole))]
    changed = [whole[:i] + b"\x00" + whole[i + 1 :] for i in range(header)]
    given = [_or_none(partial(decode_pixels, {"bytes": content}, 3)) for content in cut + changed]
    pillow = [_or_none(lambda c=content: pixels_of(decode({"bytes": c}), 3)) for content in cut + changed]
    assert given == pillow
    assert None in pillow[len(cut) :]
    assert any(pillow)


@pytest.mark.parametrize("kind", ["plain", "with EXIF data", "upright"])
def test_a_plain_jpeg_is_decoded_without_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg", reason="Pillow decodes all where it is not")
    content = _jpeg(**JPEGS[kind])
    monkeypatch.setattr(decode_module, "_decode" if "exif" in JPEGS[kind] else "open_image", None)
    assert decode_pixels({"bytes": content}, 3).shape == (3, 23, 37)


# What must not be opened


def test_an_eps_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: asked.append(given))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.eps")
    os.rename(tmp_path / "0.eps", tmp_path / "0.png")  # which calls itself a PNG
    with pytest.raises(UndecodableError, match=r"0\.png$"):
        decode({"path": str(tmp_path / "0.png")})
    assert not asked


@pytest.mark.parametrize("name", ["empty", "pipe", "device", "nothing"])
def test_what_is_no_image_file_is_one_line_and_no_wait(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    with pytest.raises(UndecodableError) as caught:
        decode({"path": str(tmp_path / name)})
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (1 << 13, (1 << 13) + 1)).save(tmp_path / "0.png")
    jpeg = bytearray(_jpeg())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, (1 << 13) + 1, 1 << 13)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    monkeypatch.setattr(decode_module, "_whole_jpeg", None)
    for stored in ({"path": str(tmp_path / "0.png")}, {"bytes": bytes(jpeg)}):
        with pytest.raises(UndecodableError, match="8192×8193 pixels are more than"):
            decode_pixels(stored, 3)


# Links and names


def picture(place: Path, shade: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(place)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes of four images; the shade says the class."""
    for number, name in enumerate("abc"):
        for i in range(4):
            picture(tmp_path / name / f"{i}.png", 10 * number + i)
    return tmp_path


def per_class(folder: Path) -> dict[int, int]:
    table = read_image_folder(folder)
    for row in table:
        shade = int(np.asarray(decode(row["image"])).max())
        assert shade // 10 == row["label"], "an image keeps the class of its own folder"
    return dict(Counter(table["label"]))


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/all", ".."),  # to the parent
        ("a/self", "."),
        ("a/other", "../c"),  # to another class, which is walked later
        ("d", "b"),  # a second name of a class
        ("b/deep/loop", "../.."),
        ("a/0-again.png", "../c/2.png"),  # to a file of another class
    ],
)
def test_links_neither_multiply_nor_mislabel_images(link: str, target: str, classes: Path) -> None:
    (classes / link).parent.mkdir(exist_ok=True)
    (classes / link).symlink_to(target)
    assert per_class(classes) == {0: 4, 1: 4, 2: 4}


def test_hard_links_are_one_file(classes: Path) -> None:
    os.link(classes / "a" / "0.png", classes / "a" / "copy.png")
    assert per_class(classes) == {0: 4, 1: 4, 2: 4}


def test_folders_behind_links_are_read_where_nothing_else_leads_to_them(
    classes: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "more" / "9.png", 7)
    (classes / "a" / "linked").symlink_to(elsewhere)
    (classes / "b" / "linked").symlink_to(elsewhere / "more")
    assert per_class(classes) == {0: 5, 1: 4, 2: 4}


def test_names_are_bytes(tmp_path: Path) -> None:
    """Latin-1 names of a file and of a class, in the run's own words."""
    for split in ("train", "test"):
        for name in (b"caf\xe9", b"th\xe9"):
            place = os.path.join(os.fsencode(tmp_path / split), name)
            os.makedirs(place)
            with open(os.path.join(place, b"\xfc.png"), "wb") as file:
                Image.new("L", (8, 8), len(name)).save(file, "PNG")
    splits = load_splits(DataConfig(name=str(tmp_path)))
    assert splits.class_names == ("caf\\xe9", "th\\xe9")
    assert [np.asarray(image).max() for image in splits.train.decode([0, 1])] == [4, 3]


def test_an_undecodable_file_is_named_whatever_its_name(tmp_path: Path) -> None:
    place = os.path.join(os.fsencode(tmp_path), b"b\xe4d.png")
    with open(place, "wb") as file:
        file.write(b"no image")
    with pytest.raises(UndecodableError, match=r"b\\xe4d\.png$"):
        decode({"path": place})


# Labels


def labelled(folder: Path, labels: Any, test_labels: Any = None) -> Splits:
    content = png(np.full((8, 8), 99, dtype=np.uint8))
    for split, values in (("train", labels), ("test", labels if test_labels is None else test_labels)):
        table = pa.table({"image": [content] * len(values), "label": values})
        pq.write_table(table, folder / f"{split}.parquet")
    return load_splits(DataConfig(name=str(folder), batch_size=1))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([100003, 500015, 900027], ("100003", "500015", "900027"), [0, 1, 2]),
        ([3, -1, 10, -1], ("-1", "3", "10"), [1, 0, 2, 0]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        (["10", "9", "10"], ("10", "9"), [0, 1, 0]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
        (pa.array([2**63 + 5, 7], pa.uint64()), ("7", "9223372036854775813"), [1, 0]),
        ([0, 1, 2], ("0", "1", "2"), [0, 1, 2]),
    ],
)
def test_the_labels_that_occur_are_numbered(
    labels: Any, names: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    splits = labelled(tmp_path, labels)
    assert splits.class_names == names
    assert splits.train.labels.tolist() == numbers
    assert splits.num_classes == len(names)


def test_a_label_keeps_its_number_in_a_split_that_lacks_others(tmp_path: Path) -> None:
    assert labelled(tmp_path, [100, 7, 55], [55, 100]).test.labels.tolist() == [1, 2]


def test_a_label_that_training_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"outside the 2 classes of the training split, such as '8'"):
        labelled(tmp_path, [100, 7], [100, 8])


def test_a_class_label_column_keeps_its_names(tmp_path: Path) -> None:
    """A head for all names, even where a small part of the images holds few of them."""
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    content = {"bytes": png(np.zeros((8, 8), dtype=np.uint8)), "path": None}
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": [content] * 2, "label": [2, 0]}, features=features)
        pq.write_table(rows.data.table, tmp_path / f"{split}.parquet")
    splits = load_splits(DataConfig(name=str(tmp_path)))
    assert (splits.class_names, splits.train.labels.tolist()) == (("a", "b", "c"), [2, 0])


# What a run says about its data


def test_a_run_can_say_what_it_reads(tmp_path: Path) -> None:
    config = folder_of(tmp_path, Image.fromarray(DEPTHS["16 bits"][0]), "png")
    assert load_splits(config).describe() == [
        "2 classes: a, b",
        "images (of a class): train 2 (1), test 2 (1)",
        "read as 32×32 pixels, 1 channel(s); stored as I;16, 32×32",
    ]


def test_what_a_run_says_fits_a_hundred_columns() -> None:
    splits = load_splits(DataConfig())
    assert max(map(len, splits.describe())) <= 98
    names = tuple(f"class number {i}" for i in range(1000))
    many = Splits(splits.train, splits.test, splits.train, names, 1, (28, 28))
    assert max(map(len, many.describe())) <= 98
    assert many.describe()[0].startswith("1000 classes: class number 0, class number 1")


def test_pixels_of_an_opaque_image_are_its_own() -> None:
    image = photograph(5)
    assert torch.equal(pixels_of(image, 3), pixels_of(image.convert("RGB"), 3))
