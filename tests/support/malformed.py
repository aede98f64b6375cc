"""Configurations that are wrong in many ways, drawn from the real schema with a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from offload_sparse.config.run import RunConfig

CALL = {"class_path": "os.system", "init_args": {"command": "true"}}
_TEXTS = (str, Path, str | int | float)
_BROKEN = [
    *(
        "a: [1",
        "a: b: c",
        "\tpolicy: 1",
        "policy: {rho: 0.1",
        "- 1\n- 2",
        "just text",
        "42",
        "'open",
        "%x",
        "@",
    ),
    *(
        "policy: *missing",
        "policy: &a [*a]",
        "policy: {<<: 1}",
        "? [1, 2]\n: 3",
        "{[1]: 2}",
        "{1: 2}",
        "null: 1",
    ),
    *(
        "policy:\n  rho: 0.1\n  rho: 0.2",
        "!!python/object/apply:os.system [true]",
        "run_dir: !!python/name:os.system",
    ),
    *(
        "policy: !!binary 'xx'",
        "policy: {rho: !!float x}",
        "train: {seed: !!int x}",
        "a: \x00",
        "policy: \x07",
        "\x1b[0m",
    ),
    *(
        "base: 3",
        "base: [1]",
        "base: missing.yaml",
        "base: {a: 1}",
        "base: .",
        "base: ''",
        "[" * 3000,
        "{a: " * 3000,
    ),
    *("policy: {rho: " + "9" * 400 + "}", "train: {seed: 1e400}", "train: {epochs: " + "9" * 5000 + "}"),
    *("policy: 2001-01-01", "train: {seed: 2001-13-45}", "---\na: 1\n---\nb: 2", "policy:\n - rho: 0.1"),
    *('run_dir: "a\\0b"', "data: {name: ''}", "model: {name: ''}", 'data: {name: "a\\0b"}'),
]
_LINES: list[list[str]] = [
    *(
        ["--policy.rho"],
        ["--policy.rho", "--round.k"],
        ["--policy.rho="],
        ["--", "x"],
        ["--=1"],
        ["-x"],
        ["stray"],
    ),
    *(
        ["--policy", "1"],
        ["--policy.", "1"],
        ["--.rho", "1"],
        ["--policy.rho.x", "1"],
        ["--config"],
        ["--config="],
    ),
    *(["--config", "missing.yaml"], ["--config", "."], ["--config", "/dev/null/x"], ["--config", "\x01"]),
    *(["--model.arguments", "["], ["--model.arguments", "3"], ["--data.mean", "["]),
    *(["--data.mean", "[x]"], ["--trackers", "{"], ["--run_dir", "a\0b"], ["--data.name", "\0"]),
    *(
        ["--train.seed", "9" * 5000],
        ["--policy.rho", "٣٫٥x"],
        ["--policy.rho", "0x1p-2"],
        ["--round.k", "1_0e"],
    ),
]


def leaves(tree: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option."""
    hints = get_type_hints(tree)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(tree)):
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def wrong_values(hint: Any) -> list[Any]:
    """Values that an option of this type never takes."""
    common: list[Any] = [None, CALL]
    if get_origin(hint) is Literal:
        return [*common, "no_such_word", 17, ["x"], ""]
    if get_origin(hint) is dict:
        return [None, [1], 3, "text", True]
    if get_origin(hint) is list:
        inner = [["x"], [None]] if get_args(hint)[0] is float else [[{"a": 1}]]
        return [*common, *inner, {"a": 1}]
    wrong: dict[Any, list[Any]] = {
        int: ["fast", 1.5, [1], "", "1e", float("inf"), float("nan"), "0x", -(10**30)],
        float: ["fast", [1], "", float("nan"), float("inf"), float("-inf"), "1,5", -(10.0**300)],
        float | Literal["auto"]: ["fast", [1], "", float("nan"), float("inf"), "1,5", -(10.0**300)],
        bool: ["maybe", 2, [True], "", 0.5],
        str: [[1], ["a"]],
        Path: [[1], ["a"]],
        list[int] | str: [["a"], [1.5], [[1]]],
        str | int: ["fast", [1], "", 1.5, "<8", "0x", -(10**30)],
        str | int | float: [[1], ["a"]],
    }
    return [*common, *wrong[hint]]


def configurations(count: int, seed: int = 0) -> Iterator[tuple[list[str], str | bytes | None]]:
    """Arguments behind ``train``, and the text of ``config.yaml`` that they read (None: they read none)."""
    generator, known = random.Random(seed), list(leaves())
    file = ["--config", "config.yaml"]
    yield from ((file, text) for text in _BROKEN)
    yield from ((line, None) for line in _LINES)
    yield file, b"\xff\xfe\x00run"
    yield file, b"policy: \xc3\x28"
    for _ in range(max(0, count - len(_BROKEN) - len(_LINES) - 2)):
        name, hint = generator.choice(known)
        kind = generator.randrange(5)
        if kind == 0:  # an unknown key, close to a known one
            at = generator.randrange(len(name) + 1)
            yield file, yaml.safe_dump({f"{name[:at]}{generator.choice('xq_')}{name[at:]}": 1})
        elif kind == 1:  # a section in the wrong place
            outer = generator.choice(known)[0].split(".")[0]
            yield file, yaml.safe_dump({outer: {f"{name}_": {"deeper": generator.random()}}})
        elif kind == 2:  # on the command line, as text
            value = generator.choice([v for v in wrong_values(hint) if hint not in _TEXTS] or [CALL])
            name = name if hint not in _TEXTS else f"{name}.x"
            yield (
                [f"--{name}", yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()],
                None,
            )
        else:
            yield file, yaml.safe_dump({name: generator.choice(wrong_values(hint))})
