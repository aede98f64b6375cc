"""The options of a tree of dataclasses: every field that is no dataclass itself, by its dotted name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import docstring_parser

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Leaf:
    """One option: a field of the tree that is no dataclass itself."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def is_container(self) -> bool:
        return get_origin(self.type) in (list, dict)

    @property
    def is_mapping(self) -> bool:
        return get_origin(self.type) is dict

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def metavar(self) -> str:
        if get_origin(self.type) is Literal:
            return "{" + ",".join(map(str, get_args(self.type))) + "}"
        if self.is_mapping:
            return "{KEY: VALUE, ...}"
        if self.is_container:
            return f"[{_METAVARS[get_args(self.type)[0]]}, ...]"
        return _METAVARS[self.type]

    @property
    def advice(self) -> str:
        """What the user should give instead of a value that does not fit."""
        if get_origin(self.type) is Literal:
            return "give one of " + ", ".join(map(str, get_args(self.type)))
        if self.is_mapping:
            return "give a mapping such as {width: 64}"
        if self.is_container:
            return f"give a list such as {_LISTS[get_args(self.type)[0]]}"
        return f"give {_WORDS[self.type]}"


_METAVARS = {float: "NUMBER", int: "INTEGER", bool: "{true,false}", str: "TEXT", Path: "PATH"}
_METAVARS[str | int | float] = "TEXT"  # type: ignore[index]
_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
_WORDS[str | int | float] = "text or a number"  # type: ignore[index]
_LISTS = {float: "[0.5, 0.25]", int: "[1, 2]", str: "[tensorboard]"}


@dataclass(frozen=True)
class Section:
    """The leaves of one dataclass of the tree, in the order of its fields."""

    title: str
    leaves: tuple[Leaf, ...]


def sections(tree: type, prefix: str = "") -> Iterator[Section]:
    """The sections of a dataclass tree, outermost first; help is the "Attributes:" part of the docstrings."""
    docstring = docstring_parser.parse(tree.__doc__ or "")
    inherited = [docstring_parser.parse(base.__doc__ or "") for base in tree.__mro__[-2::-1]]
    described = [entry for text in inherited for entry in text.params]
    helps = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described}
    hints = typing.get_type_hints(tree)
    leaves, nested = [], []
    for field in dataclasses.fields(tree):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            nested.append((hints[field.name], f"{name}."))
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        leaves.append(Leaf(name, hints[field.name], default, helps.get(field.name, "")))
    yield Section((docstring.short_description or "").rstrip("."), tuple(leaves))
    for inner, inner_prefix in nested:
        yield from sections(inner, inner_prefix)


def build(tree: Callable[..., Tree], values: Mapping[str, Any], prefix: str = "") -> Tree:
    """An instance of ``tree`` from its leaves by dotted name."""
    hints = typing.get_type_hints(tree)
    arguments = {}
    for field in dataclasses.fields(tree):  # type: ignore[arg-type]
        name, hint = prefix + field.name, hints[field.name]
        is_section = dataclasses.is_dataclass(hint)
        arguments[field.name] = build(hint, values, f"{name}.") if is_section else values[name]
    return tree(**arguments)


def show(value: Any) -> str:
    """A value as it would be written in YAML, on one line."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value.strip() and value.isprintable() else repr(value)
    return str(value)
