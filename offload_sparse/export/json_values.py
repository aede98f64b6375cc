"""JSON artefacts, read into dataclasses: nothing of a file is believed before its type and size are checked.

    @dataclass(frozen=True)
    class Addition:                     read(path, Addition)           one line, with the place and what was
        width: Count                    ───────────────────▶  Addition  expected there, or a ValueError
        left: tuple[Count, ...]

A field may be bool, int, ``Count``, float, str, a ``Literal`` of texts, ``dict[str, T]``, ``tuple[T, ...]``,
``T | None``, another such dataclass, or Any (any JSON value). What a type cannot say, ``__post_init__`` says
with a ValueError.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import stat
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NewType, TypeVar, get_args, get_origin, get_type_hints

Count = NewType("Count", int)
"""An integer from 0 to 2⁶³ − 1: a size, a position, a number of steps."""

MAX_BYTES = 64 << 20
MAX_VALUES = 4_000_000
"""Of one document; bounds the memory that parsing takes to a few hundred MiB."""

MAX_DEPTH = 64

_T = TypeVar("_T")
_hints = functools.cache(get_type_hints)


def read(path: Path, kind: type[_T], sealed_by: str = "") -> _T:
    """The contents of a JSON file as the dataclass ``kind``: a key that it lacks is an error, as is one
    without default that is missing. Where the file has a key ``digest`` and the dataclass does not, it must
    be that of all the other keys; a file with the key ``sealed_by`` must have one. Raises FileNotFoundError:
    there is none; ValueError: it is no regular file, larger than ``MAX_BYTES``, no JSON, or not of this kind;
    one line that names the place in the file and never shows a whole value."""
    try:
        value = parse(_contents(path))
        own = getattr(kind, "__dataclass_fields__", {"digest": None})
        signed = isinstance(value, dict) and not value.keys().isdisjoint(("digest", sealed_by))
        if signed and "digest" not in own and value.pop("digest", None) != digest(value):
            raise ValueError("its digest does not fit")
        return convert(value, kind)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def parse(text: bytes) -> Any:
    """A JSON document (UTF-8) of bounded size and nesting. Raises ValueError: it is none; an object names a
    key twice; a number is not finite."""
    _check_values(text)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if isinstance(value, dict | list):
        _check_depth(value)
    return value


def convert(value: Any, kind: type[_T]) -> _T:
    """A parsed JSON value as ``kind``: a dataclass, or any type that a field may have. Raises ValueError: it
    is not of that kind."""
    return _convert(value, kind, "")


def digest(value: Any) -> str:
    """BLAKE2b of a JSON value whatever its layout and the order of its keys, 16 bytes in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sealed(body: dict[str, Any]) -> str:
    """The text of a file with ``body`` and its digest, as ``read`` wants it. Raises ValueError: that
    would not take so much."""
    text = json.dumps(body | {"digest": digest(body)}, allow_nan=False) + "\n"
    try:
        _check_bytes(text.encode())
        _check_values(text.encode())
        _check_depth(body)
    except ValueError as error:
        raise ValueError(f"its JSON could not be read again: {error}") from None
    return text


def json_value(value: Any) -> Any:
    """``value`` as strict JSON can hold it: tensors of one element as numbers, NaN and infinities as None.
    Raises ValueError: JSON has nothing for it."""
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, bool | int | float | str | None):
        if not hasattr(value, "item"):
            raise ValueError(f"a value of type {type(value).__name__} cannot be written as JSON")
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def shown(value: Any) -> str:
    """A value as a message may show it: at most some 40 characters of it, on one line."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text + "…" if isinstance(value, str) and len(value) > 40 else text


def _contents(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for its writer
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        text = file.read(MAX_BYTES + 1)
    _check_bytes(text)
    return text


def _check_bytes(text: bytes) -> None:
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")


def _check_values(text: bytes) -> None:
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # two readers could believe two different values
        raise ValueError(f"an object names one of its keys twice (its first is {shown(pairs[0][0])})")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is not finite")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        values = (entry.values() if isinstance(entry, dict) else entry for entry in level)
        level = [child for inner in values for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def _convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` as ``kind``; ``where`` is its place in the document, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if origin is types.UnionType:
        return _convert(value, inner[0], where)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(entry, inner[1], _inside(where, key)) for key, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple([_convert(entry, inner[0], f"{where}[{i}]") for i, entry in enumerate(value)])
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_object(value, kind, where)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    number = type(value) is int and value.bit_length() < 64
    if kind is float and (number or type(value) is float):
        return float(value)
    if (kind is int and number) or (kind is Count and number and value >= 0):
        return value
    if kind in (bool, str) and type(value) is kind:
        return value
    raise ValueError(f"{where or 'the document'} is {shown(value)} instead of {_name(kind)}")


def _convert_object(value: dict[str, Any], kind: Any, where: str) -> Any:
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        optional = field.default, field.default_factory
        if name not in value and optional == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"{_inside(where, name)} is missing")
    for key in value:
        if key not in fields:
            raise ValueError(f"{_inside(where, key)} is no key of this file")
    return kind(**{key: _convert(entry, hints[key], _inside(where, key)) for key, entry in value.items()})


def _inside(where: str, key: str) -> str:
    """A place below another, such as ``groups.conv1.kept``; long or odd names are shown in part only."""
    name = key if key.isprintable() and len(key) <= 60 else shown(key)
    return f"{where}.{name}" if where else name


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    names = {Count: "a count", int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return "a list" if get_origin(kind) is tuple else names.get(kind, "an object")
