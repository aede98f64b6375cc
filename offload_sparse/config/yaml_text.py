"""YAML as YAML 1.2 reads it (core schema): of bounded size, without aliases, tags, or keys twice."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml

LARGEST = 1 << 18
"""Most bytes of a file."""

_SCALARS = {  # of the core schema; what is not finite is no number
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
_NUMBER = re.compile("|".join(_SCALARS[kind][0] for kind in ("int", "float")))
_TAGS = {None, *(f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    """A mapping has every key once, and nothing refers to anything."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: read for tag, read in yaml.SafeLoader.yaml_constructors.items() if tag in _TAGS
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {shortened(repr(key.value))} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if abs(value) >= 1 << 63:
            raise yaml.MarkedYAMLError(problem="a number is too large", problem_mark=node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
for _class in (_Loader, _Dumper):
    for _kind, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str, source: str) -> Any:
    """The value that ``text`` writes down; ``source`` names it in errors. Raises ValueError: the text is not
    YAML; one line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{source}: not valid YAML, it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number that Python cannot hold
        raise ValueError(f"{source}: {error}; give another value") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{where}: not valid YAML, {shortened(problem)}") from error


def number(text: str) -> float | str:
    """The number that ``text`` writes down; text that writes down none as it is, in quotes."""
    return parse(text, "a number") if _NUMBER.fullmatch(text) else repr(text)


def read_keys(path: Path) -> dict[Any, Any]:
    """The mapping at the top level of a YAML file; empty for an empty file. Raises ValueError: the file is
    missing, no regular file, too large, cannot be read, or holds something else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no regular file; give a YAML file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{path} has more than {LARGEST} bytes; give a YAML file")
        found = parse(content.decode("utf-8"), str(path))
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {path}; check the path") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a YAML file") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path} holds no keys at its top level; write lines such as 'method: dense'")
    return found or {}


def dump(value: Any, flow: bool = False) -> str:
    """Plain values (mappings, lists, text, numbers, booleans, None) as YAML, with ``flow`` on one line and in
    brackets; ``parse`` is its inverse."""
    # With allow_unicode, PyYAML writes some characters that YAML takes for line breaks as they are.
    style: dict[str, Any] = {"default_flow_style": flow, "width": float("inf") if flow else 80}
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, **style)
    return text.removesuffix("...\n")


def shortened(value: Any) -> str:
    """A value as YAML would write it on one line, cut to what fits into a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    value = str(value) if isinstance(value, Path) else value
    text = value if isinstance(value, str) and value.strip() and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
