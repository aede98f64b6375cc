"""Data as people have it: flat folders, val/ and valid/, listings, tar shards, a map of classes."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.source import Splits, load_splits
from tests.workloads.data.images import png
from tests.workloads.data.jpegs import CLASSES, images_of, write_folder


def splits_of(name: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name=str(name), image_size=16, **settings))


def image(shade: int) -> bytes:
    return png(np.full((8, 8), shade, dtype=np.uint8))


def shades(splits: Splits) -> tuple[list[int], list[int]]:
    """The grey values of the training and test images, which stand for the images."""
    found = [
        [int(np.asarray(i).max()) for i in part.decode(range(len(part)))]
        for part in (splits.train, splits.test)
    ]
    return found[0], found[1]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Classes of 10, 4 and 1 images without any split."""
    for name, count, first in (("ant", 10, 0), ("bee", 4, 100), ("cow", 1, 200)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(image(first + i))
    return tmp_path


def test_of_a_flat_folder_one_in_five_of_each_class_is_for_testing(flat: Path) -> None:
    splits = splits_of(flat)
    assert splits.class_names == ("ant", "bee", "cow")
    assert splits.train.labels.bincount().tolist() == [8, 3, 1]
    assert splits.test.labels.bincount(minlength=3).tolist() == [2, 1, 0]
    train, test = shades(splits)
    assert sorted(train + test) == [*range(10), *range(100, 104), 200]


def test_the_split_of_a_flat_folder_is_the_same_each_time(flat: Path) -> None:
    assert shades(splits_of(flat)) == shades(splits_of(flat))
    assert shades(splits_of(flat))[1] != [0, 1, 100], "chosen at random"


@pytest.mark.parametrize("held_out", ["val", "valid", "validation"])
def test_val_and_valid_are_the_test_images_where_nothing_is_called_test(
    held_out: str, tmp_path: Path
) -> None:
    (write_folder(tmp_path) / "test").rename(tmp_path / held_out)
    assert len(splits_of(tmp_path).test) == 9


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "Val")])
def test_names_of_splits_may_have_capitals(train: str, test: str, tmp_path: Path) -> None:
    """Their folders are no classes."""
    for name, called in (("train", train), ("test", test)):
        (write_folder(tmp_path) / name).rename(tmp_path / called)
    splits = splits_of(tmp_path)
    assert splits.class_names == CLASSES
    assert (len(splits.train), len(splits.test)) == (24, 9)


@pytest.mark.parametrize("called", ["val", "valid", "validation"])
def test_validation_has_three_usual_names(called: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (write_folder(tmp_path / "more", test=6) / "test").rename(tmp_path / called)
    (tmp_path / "more").rename(tmp_path / ".more")
    splits = splits_of(tmp_path, validation="validation")
    assert splits.validation is not None
    assert (len(splits.validation), len(splits.test)) == (6, 9)


@pytest.mark.parametrize("called", ["val", "valid", "validation"])
@pytest.mark.parametrize("folder", ["val", "valid"])
def test_images_are_not_used_for_validation_and_for_testing(
    folder: str, called: str, tmp_path: Path
) -> None:
    (write_folder(tmp_path) / "test").rename(tmp_path / folder)
    with pytest.raises(ValueError, match=f"has no split '(test|{called})', only train, {folder}"):
        splits_of(tmp_path, validation=called)


# Listings


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_listing_names_files_and_classes(ending: str, flat: Path) -> None:
    rows = [
        ("ant/3.png", "insect", "train"),
        ("cow/0.png", "mammal", "train"),
        ("bee/1.png", "insect", "test"),
    ]
    if ending == "jsonl":
        text = "".join(
            json.dumps(dict(zip(("path", "label", "split"), row, strict=True))) + "\n" for row in rows
        )
    else:
        comma = "," if ending == "csv" else "\t"
        text = "\n".join(comma.join(row) for row in [("path", "label", "split"), *rows])
    (flat / f"all.{ending}").write_text(text)
    splits = splits_of(flat / f"all.{ending}")
    assert splits.class_names == ("insect", "mammal")
    assert (shades(splits), splits.train.labels.tolist()) == (([3, 200], [101]), [0, 1])


def test_listings_may_be_named_after_their_splits(flat: Path) -> None:
    (flat / "train.csv").write_text("file_name,class\nant/1.png,10\nbee/0.png,9\n")
    (flat / "val.csv").write_text("file_name,class\nbee/2.png,9\n")
    splits = splits_of(flat)
    assert splits.class_names == ("9", "10"), "numbers in their order"
    assert shades(splits) == ([1, 100], [102])


@pytest.mark.parametrize("stray", ["ILSVRC2012.tar", "metadata.parquet", "labels.csv"])
def test_files_beside_the_folders_of_the_splits_are_passed_over(stray: str, flat: Path) -> None:
    """Such as the archives that they come from; alone, they are named."""
    folder, alone = flat / "data", flat / "alone"
    for split in ("train", "test"):
        shutil.copytree(flat / "ant", folder / split / "ant")
    (folder / stray).write_bytes(b"")
    assert shades(splits_of(folder)) == ([*range(10)], [*range(10)])
    alone.mkdir()
    (folder / stray).rename(alone / stray)
    with pytest.raises(ValueError, match=f"has no split 'train', only {Path(stray).stem}"):
        splits_of(alone)


def test_shards_of_a_listing_may_hold_numbers_and_words(flat: Path) -> None:
    (flat / "train-0.csv").write_text("path,label\nant/0.png,747\nant/1.png,747\n")
    (flat / "train-1.csv").write_text("path,label\nbee/0.png,kite\n")
    (flat / "test.csv").write_text("path,label\nant/2.png,747\n")
    splits = splits_of(flat)
    assert (splits.class_names, splits.train.labels.tolist()) == (("747", "kite"), [0, 0, 1])
    assert shades(splits) == ([0, 1, 100], [2])


def test_labels_in_a_listing_keep_their_zeros(flat: Path) -> None:
    (flat / "all.csv").write_text("path,label\n" + "".join(f"ant/{i}.png,00{i % 2}\n" for i in range(10)))
    splits = splits_of(flat / "all.csv")
    assert splits.class_names == ("000", "001")
    assert splits.test.labels.bincount().tolist() == [1, 1]


@pytest.mark.parametrize(("ending", "nothing"), [("jsonl", "null"), ("jsonl", '""'), ("csv", "")])
def test_a_row_without_a_path_is_an_image_that_cannot_be_decoded(
    ending: str, nothing: str, flat: Path
) -> None:
    rows = [("ant/1.png", "train"), ("ant/2.png", "train"), (nothing, "train"), ("ant/3.png", "test")]
    if ending == "jsonl":
        paths = [path if path == nothing else json.dumps(path) for path, _ in rows]
        text = "".join(
            f'{{"image": {path}, "label": "ant", "split": "{split}"}}\n'
            for path, (_, split) in zip(paths, rows, strict=True)
        )
    else:
        text = "image,label,split\n" + "".join(f"{path},ant,{split}\n" for path, split in rows)
    (flat / f"all.{ending}").write_text(text)
    train = splits_of(flat / f"all.{ending}").train
    assert [isinstance(image, str) for image in train.decode(range(3))] == [False, False, True]


def test_words_for_nothing_are_names_of_classes(flat: Path) -> None:
    rows = "".join(f"ant/{i}.png,{word}\n" for i, word in enumerate(["NA", "null", "None"] * 2))
    (flat / "all.csv").write_text("path,label\n" + rows)
    assert splits_of(flat / "all.csv").class_names == ("NA", "None", "null")


def test_the_columns_of_a_listing_may_have_any_names(flat: Path) -> None:
    """Also where usual names are there, which mean something else."""
    rows = "".join(f"ant/{i}.png,0{i % 2},{i}\n" for i in range(10))
    (flat / "all.csv").write_text("photo,kind,label\n" + rows)
    splits = splits_of(flat / "all.csv", columns=["photo", "kind"])
    assert splits.class_names == ("00", "01")
    train, test = shades(splits)
    assert sorted(train + test) == list(range(10))
    assert splits_of(flat, columns=["photo", "kind"]).class_names == ("ant", "bee", "cow"), "of a folder"


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is an empty folder; give one with images in <class>/"):
        splits_of(tmp_path)


def test_names_in_a_listing_are_bytes(flat: Path) -> None:
    (flat / "cow" / "0.png").rename(flat / "cow" / "m\udcfc.png")
    (flat / "all.csv").write_bytes(b"path,label,split\ncow/m\xfc.png,cow,train\nant/0.png,cow,test\n")
    assert shades(splits_of(flat / "all.csv")) == ([200], [0])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", b"path,colour\na.png,red\n", "no column label or class"),
        ("a.csv", b"label\nred\n", "no column image or path"),
        ("a.jsonl", b"{]", "cannot be read as a listing"),
        ("a.csv", b"", "cannot be read as a listing"),
        ("a.csv", b"path,label\n", "split without rows|no split"),
        ("a.csv", b"path,label,split\n/dev/zero,a,train\n/dev/zero,a,test\n", "no regular file"),
        ("a.csv", b"path,label,split\na,x,train\nb,,train\nc,x,test\n", "has 1 rows without a label"),
        ("a.tsv", b"label\tpath\nx\ta\nx\tb\n\tc\n\td\n", "has 1 rows without a label"),
        ("a.jsonl", b'{"path": 3, "label": "x"}\n', "holds int64 in column path, not paths"),
        ("a.jsonl", b'{"path": {"bytes": "x"}, "label": "x"}\n', "column path, not paths"),
        ("a.jsonl", b'{"path": null, "label": "x"}\n' * 2, "image 0 of split 'train' cannot be decoded"),
        ("a.jsonl", b'{"path": "a", "label": ""}\n' * 2, "has 1 rows without a label"),
        ("a.jsonl", b'{"path": "a", "label": null}\n' * 2, "has 1 rows without a label"),
    ],
)
def test_a_listing_that_cannot_serve_is_one_line(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        splits_of(tmp_path / name)
    assert "\n" not in str(caught.value)


# Tar shards


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def library_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("library_cache")
@pytest.mark.parametrize("kind", ["cls", "txt", "json", "folders"])
def test_tar_shards_in_the_layout_of_webdataset(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 3)):
        for shard in range(3):
            members = {}
            for row, (name, label, content) in enumerate(images_of(split, count, False)):
                if row % 3 != shard:
                    continue
                stem = name.partition(".")[0]
                key = f"{CLASSES[label]}/{stem}" if kind == "folders" else stem
                members[f"{key}.jpg"] = content
                text = {"cls": str(label), "txt": CLASSES[label], "json": json.dumps({"label": label})}
                if kind != "folders":
                    members[f"{key}.{kind}"] = text[kind].encode()
            write_tar(folder / f"{split}-{shard:05d}.tar", members)
    splits = splits_of(folder)
    assert splits.class_names == (("0", "1", "2") if kind in ("cls", "json") else CLASSES)
    assert splits.train.labels.bincount().tolist() == [2, 2, 2]
    assert splits.test.labels.bincount().tolist() == [1, 1, 1]
    assert splits.in_channels == 3


@pytest.mark.usefixtures("library_cache")
def test_the_end_of_a_line_is_no_part_of_a_class(tmp_path: Path) -> None:
    """As ``echo ant > 0.txt`` writes it."""
    for split in ("train", "test"):
        members = {"0.png": image(1), "0.txt": b"ant\n", "1.png": image(2), "1.txt": b"ant"}
        write_tar(tmp_path / f"{split}.tar", members | {"2.png": image(3), "2.txt": b"bee\n"})
    splits = splits_of(tmp_path)
    assert (splits.class_names, splits.train.labels.tolist()) == (("ant", "bee"), [0, 0, 1])


@pytest.mark.usefixtures("library_cache")
def test_a_tar_without_images_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {"0.txt": b"words"})
    (tmp_path / "test.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"train\.tar holds no images"):
        splits_of(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"train\.tar cannot be read as a tar shard"):
        splits_of(tmp_path)


# The names of the classes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_class_map_names_classes_and_joins_those_of_one_name(
    form: str, encoding: str, flat: Path
) -> None:
    names = {"elk": "mammal", "cow": "mammal", "ant": "small insect", "bee": "small insect", "eel": "fish"}
    file = flat / "names.txt"
    lines = "".join(f"{label} {name}\n" for label, name in names.items())
    file.write_text(json.dumps(names) if form == "json" else lines, encoding=encoding)
    splits = splits_of(flat, class_map=str(file))
    assert splits.class_names == ("mammal", "small insect"), "those that occur, in the order of the file"
    assert splits.train.labels.bincount().tolist() == [1, 11]


def test_a_label_that_the_class_map_lacks_is_named(flat: Path) -> None:
    (flat / "names.json").write_text('{"ant": "insect", "bee": "insect"}')
    with pytest.raises(ValueError, match=r"outside the 1 classes of data\.class_map, such as 'cow'"):
        splits_of(flat, class_map=str(flat / "names.json"))


@pytest.mark.parametrize("text", ["{", "[1]", "one", None])
def test_a_class_map_that_cannot_be_read_is_one_line(text: str | None, flat: Path) -> None:
    if text is not None:
        (flat / "names").write_text(text)
    with pytest.raises(ValueError, match=r"data\.class_map .*names cannot be read") as caught:
        splits_of(flat, class_map=str(flat / "names"))
    assert "\n" not in str(caught.value)
