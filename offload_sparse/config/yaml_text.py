"""YAML text in and out, with the same reading of numbers in both directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-3`` is a number, as in YAML 1.2, and a key that appears twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"key {key.value!r} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads: text that looks like ``1e-3`` is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse(text: str, source: str) -> Any:
    """The value that ``text`` writes down; ``source`` names it in errors.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{source}: not valid YAML, it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number or a date that Python cannot hold
        raise ValueError(f"{source}: {error}; give another value") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{where}: not valid YAML, {problem}") from error


def read_keys(path: Path) -> dict[Any, Any]:
    """The mapping at the top level of a YAML file; empty for an empty file.

    Raises:
        ValueError: the file is missing, cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {path}; check the path") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a YAML file") from None
    content = parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys at its top level; write lines such as 'method: dense'")
    return content


def dump(value: Any) -> str:
    """Plain values (mappings, lists, text, numbers, booleans, None) as YAML; ``parse`` is its inverse."""
    # With allow_unicode, PyYAML writes some characters that YAML takes for line breaks as they are.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def as_word(value: Any, choices: tuple[Any, ...]) -> Any:
    """The word among ``choices`` that YAML has read as a truth value (a bare ``on``, ``off`` or ``no``);
    other values as they are.
    """
    if not isinstance(value, bool):
        return value
    words = ("on", "yes") if value else ("off", "no")
    return next((word for word in words if word in choices), value)
