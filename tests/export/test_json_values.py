"""JSON artefacts become dataclasses, or one line that says where they do not fit."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from offload_sparse.export import json_values
from offload_sparse.export.json_values import Count, convert, digest, parse, read, sealed


@dataclass(frozen=True)
class Part:
    size: Count
    kept: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if any(position >= self.size for position in self.kept):
            raise ValueError("a position lies outside its part")


@dataclass(frozen=True)
class Document:
    kind: Literal["a", "b"]
    parts: dict[str, Part]
    scale: float = 1.0
    note: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def test_a_document_becomes_its_dataclass(tmp_path: Path) -> None:
    text = '{"kind": "b", "parts": {"x": {"size": 3, "kept": [0, 2]}}, "scale": 2, "note": null}'
    (tmp_path / "d.json").write_text(text)
    found = read(tmp_path / "d.json", Document)
    assert found == Document("b", {"x": Part(Count(3), (Count(0), Count(2)))}, 2.0, None, {})
    assert isinstance(found.scale, float)


GOOD: dict[str, Any] = {"kind": "a", "parts": {"x": {"size": 3, "kept": [1]}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "c"}, "kind is 'c' instead of one of a, b"),
        ({"kind": ["a"]}, "kind is a list of 1 instead of one of a, b"),
        ({"scale": "1"}, "scale is '1' instead of a number"),
        ({"scale": True}, "scale is True instead of a number"),
        ({"note": 3}, "note is 3 instead of a text"),
        ({"note": "x" * 10_000_000, "scale": None}, "scale is None instead of a number"),
        ({"scale": "x" * 10_000_000}, "scale is '" + "x" * 40 + "'… instead of a number"),
        ({"parts": {"x": {"size": -1}}}, "parts.x.size is -1 instead of a count"),
        ({"parts": {"x": {"size": 2**70}}}, "parts.x.size is an integer of more than 64 bits instead"),
        ({"parts": {"x": {"size": 1.0}}}, "parts.x.size is 1.0 instead of a count"),
        ({"parts": {"x": {"size": 3, "kept": [0, True]}}}, r"parts.x.kept\[1\] is True instead of a count"),
        ({"parts": {"x": {"size": 3, "kept": {}}}}, "parts.x.kept is an object of 0 instead of a list"),
        ({"parts": {"x": {"size": 3, "kept": [3]}}}, "a position lies outside its part"),
        ({"parts": {"x\n": {"size": []}}}, r"parts.'x\\n'.size is a list of 0 instead of a count"),
        ({"parts": {"x": {}}}, "parts.x.size is missing"),
        ({"parts": [1]}, "parts is a list of 1 instead of an object"),
        ({"odd": 1}, "odd is no key of this file"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        convert(GOOD | change, Document)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "Expecting value"),
        (b"[" * 1_000_000, "deeper than 64"),
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[1e999]", "not finite"),
        (b"[NaN]", "not finite"),
        (b"[-Infinity]", "not finite"),
        (b"1" * 5000, "digits"),
        (b'"\xff"', "not UTF-8"),
        (b"[" + b"[]," * 4_000_000 + b"1]", "more than 4,000,000 values"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_documents_that_are_bombs_or_no_json_are_refused(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "large"])
def test_only_regular_files_of_bounded_size_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "MAX_BYTES", 1000)
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b" " * 1001)
    with pytest.raises(ValueError, match=f"^{path} (is damaged: it is|cannot be read)"):
        read(path, Document)


@pytest.mark.parametrize("body", [{"x": [0] * 20}, {"x": "x" * 200}, {"x": json.loads("[" * 64 + "]" * 64)}])
def test_what_could_not_be_read_again_is_not_sealed(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "MAX_VALUES", 20)
    monkeypatch.setattr(json_values, "MAX_BYTES", 200)
    assert parse(sealed({"x": [0] * 10}).encode())["x"] == [0] * 10
    with pytest.raises(ValueError, match=r"not be read again: it (holds more|is larger|is nested deeper)"):
        sealed(body)


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize(("text", "fits"), [("", True), ('"seal": "x", ', False)])
def test_a_file_that_has_lost_its_digest_is_damaged(text: str, fits: bool, tmp_path: Path) -> None:
    """A file that never had one is taken as it is."""
    (tmp_path / "d.json").write_text("{" + text + '"size": 3}')
    if fits:
        assert read(tmp_path / "d.json", Part, sealed_by="seal") == Part(Count(3))
    else:
        with pytest.raises(ValueError, match="its digest does not fit"):
            read(tmp_path / "d.json", Part, sealed_by="seal")
