"""Command lines and YAML files into typed configuration trees, and back.

    defaults of the dataclasses < base files of a YAML < the YAML < a later --config < dotted overrides

Every leaf of a dataclass tree is one option, named by its dotted path (``--policy.rho 0.1``). Files and
overrides are flattened into one mapping from dotted names to values; jsonargparse converts and checks the
values and lays out the help text, and the dataclasses check what types cannot say. Whatever is wrong is a
``ValueError`` of one line, which ``command.run_command`` turns into the program's error line and exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
import typing
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from offload_sparse.config import yaml_text
from offload_sparse.config.option_tree import Leaf, Section, build, sections, show
from offload_sparse.config.run import RunConfig

Tree = TypeVar("Tree")

PROGRAM = "offload-sparse"


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help and default of each option; the type shows in the placeholder already."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: Action) -> str:
        # jsonargparse lists its own "--name+" beside every list; here lists are given whole.
        return re.sub(r", --\S+\+ .*$", "", super()._format_action_invocation(action))


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise ArgumentError(None, message) from ex


@dataclass(frozen=True)
class Options(Generic[Tree]):
    """The options of one command.

    Attributes:
        tree: dataclass whose leaves are the options.
        program: how the command is called, for its usage line.
        examples: command lines that work, shown at the end of ``--help``; the first also where something is
            missing.
        positional: leaves that are given without their name, in order; one that is a list takes all that is
            left.
        reads_files: whether ``--config FILE.yaml`` is accepted.
        aliases: short names of options, without dashes, to the names of their leaves.
    """

    tree: type[Tree]
    program: str
    examples: tuple[str, ...]
    positional: tuple[str, ...] = ()
    reads_files: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Tree:
        """The configuration that a command line asks for; ``--help`` prints the help text and exits with 0.

        Args:
            argv: the arguments behind the name of the command.
            defaults: values by dotted name that stand in for the defaults of ``tree``.

        Raises:
            ValueError: unknown key, wrong type or value, missing file; one line with advice.
        """
        if any(token in ("-h", "--help") for token in argv):
            self._parser.print_help()
            raise SystemExit(0)
        files, overrides = self._split(argv)
        values = dict(defaults or {})
        for path in files:
            values |= self._load(path)
        for name, text in overrides:
            self._override(values, name, text)
        return build(self.tree, self._convert(values))

    @cached_property
    def _sections(self) -> tuple[Section, ...]:
        return tuple(sections(self.tree))

    @cached_property
    def _leaves(self) -> dict[str, Leaf]:
        return {leaf.name: leaf for section in self._sections for leaf in section.leaves}

    @cached_property
    def _parser(self) -> _Parser:
        """The jsonargparse parser: conversion of values, and the help text."""
        leaves = [self._leaves[name] for name in self.positional]
        usage = "".join(f" {_placeholder(leaf)}" for leaf in leaves)
        usage += " [--config FILE.yaml]" if self.reads_files else ""
        parser = _Parser(
            prog=self.program,
            usage=f"{self.program}{usage} [--KEY VALUE ...]",
            description=textwrap.fill(self._sections[0].title + ".", 100),
            epilog="\n".join(["examples:", *(f"  {example}" for example in self.examples)]),
            formatter_class=_HelpFormatter,
            exit_on_error=False,
        )
        if self.reads_files:
            parser.add_argument(
                "--config",
                metavar="FILE.yaml",
                help="read values from this file; may be given again, then later files win. A file can start "
                "from others by a top-level key 'base: other.yaml'.",
            )
        for number, section in enumerate(self._sections):
            group = parser.add_argument_group(section.title if number else "settings")
            for leaf in section.leaves:
                self._add(group, leaf)
        return parser

    def _add(self, group: Any, leaf: Leaf) -> None:
        shown = "required" if leaf.required else f"default: {show(leaf.default)}"
        text = f"{leaf.help.replace('``', '')} ({shown})"
        if leaf.name in self.positional:
            group.add_argument(leaf.name, type=leaf.type, nargs="?", metavar=leaf.name.upper(), help=text)
            return
        default = None if leaf.required else leaf.default
        names = [leaf.name, *(alias for alias, name in self.aliases.items() if name == leaf.name)]
        flags = [f"--{name}" for name in names]
        group.add_argument(*flags, type=leaf.type, default=default, metavar=leaf.metavar, help=text)

    def _split(self, argv: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
        """Configuration files, and (dotted name, text) of every override, each in the order given."""
        files: list[Path] = []
        overrides: list[tuple[str, str]] = []
        positional, collected = list(self.positional), []
        tokens = list(argv)
        while tokens:
            token = tokens.pop(0)
            if not token.startswith("--"):
                if not positional:
                    raise ValueError(f"unexpected argument {token!r}; options are written as --KEY VALUE")
                if self._leaves[positional[0]].is_container:
                    collected.append(token)
                else:
                    overrides.append((positional.pop(0), token))
                continue
            name, equals, text = token[2:].partition("=")
            name = self.aliases.get(name, name)
            is_file = name == "config" and self.reads_files
            if not is_file:
                self._check_known(name)
            if not equals:
                text = self._take_value(name, tokens)
            if is_file:
                files.append(Path(text).expanduser())
            else:
                overrides.append((name, text))
        if collected:
            overrides.append((positional[0], yaml_text.dump(collected)))
        return files, overrides

    def _take_value(self, name: str, tokens: list[str]) -> str:
        leaf = self._leaves.get(name)
        is_last = not tokens or tokens[0].startswith("--")
        if leaf is not None and leaf.type is bool:
            # `bench --quick memory`: what follows a flag is a positional where the command has one.
            if is_last or (self.positional and tokens[0] not in ("true", "false")):
                return "true"
        elif is_last:
            raise ValueError(f"--{name} needs a value; {leaf.advice if leaf else 'give one behind it'}")
        return tokens.pop(0)

    def _mapping_of(self, name: str) -> Leaf | None:
        """The mapping that ``name`` is an entry of: model.arguments for model.arguments.width."""
        for leaf in self._leaves.values():
            if leaf.is_mapping and name.startswith(f"{leaf.name}."):
                return leaf
        return None

    def _check_known(self, name: str, source: str = "") -> None:
        if name in self._leaves or self._mapping_of(name):
            return
        shown = f"{source}: unknown key {name}" if source else f"unknown option --{name}"
        raise ValueError(f"{shown}; {self._closest(name, dashes='' if source else '--')}")

    def _closest(self, name: str, dashes: str) -> str:
        below = [known for known in self._leaves if known.startswith(f"{name}.")]
        if below:
            return f"name a key of this section, such as {dashes}{below[0]}"
        last = {known: known.rsplit(".", 1)[-1] for known in self._leaves}
        found = difflib.get_close_matches(name, self._leaves, 1, 0.8)
        found = found or [known for known, short in last.items() if short == name.rsplit(".", 1)[-1]]
        found = found or difflib.get_close_matches(name, self._leaves, 1, 0.6)
        if not found:
            close = difflib.get_close_matches(name.rsplit(".", 1)[-1], last.values(), 1, 0.8)
            found = [known for known, short in last.items() if short in close]
        if found:
            return "did you mean " + " or ".join(dashes + known for known in found[:3]) + "?"
        return f"`{self.program} --help` lists all keys"

    def _load(self, path: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
        """Values by dotted name of a YAML file on top of those of its ``base`` files."""
        resolved = path.resolve()
        if resolved in parents:
            chain = " -> ".join(p.name for p in (*parents, resolved))
            raise ValueError(f"{path}: base files form a cycle ({chain}); remove one 'base'")
        content = yaml_text.read_keys(path)
        bases = content.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ValueError(f"{path}: base is {bases!r}; give a path or a list of paths")
        values: dict[str, Any] = {}
        for base in bases:
            values |= self._load(path.parent / Path(base).expanduser(), (*parents, resolved))
        return values | self._flatten(content, str(path))

    def _flatten(self, node: Mapping[Any, Any], source: str, prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in self._leaves:
                flat[name] = value
            elif any(known.startswith(f"{name}.") for known in self._leaves):
                if not isinstance(value, Mapping | None):
                    below = next(known for known in self._leaves if known.startswith(f"{name}."))
                    raise ValueError(f"{source}: {name} is {value!r}; give keys below it, such as {below}")
                flat |= self._flatten(value or {}, source, f"{name}.")
            else:
                self._check_known(name, source)
                self._override(flat, name, value)
        return flat

    def _override(self, values: dict[str, Any], name: str, value: Any) -> None:
        """Set one value; text for lists and mappings is YAML, ``mapping.key`` sets one entry of a mapping."""
        mapping = self._mapping_of(name) if name not in self._leaves else None
        if isinstance(value, str) and (mapping or self._leaves[name].is_container):
            value = yaml_text.parse(value, f"--{name}")
            if isinstance(value, str) and not mapping and self._leaves[name].type == list[str]:
                value = [entry.strip() for entry in value.split(",")]  # tensorboard,wandb
        if mapping:
            entries = values.get(mapping.name, mapping.default)
            values[mapping.name] = {**entries, name.removeprefix(f"{mapping.name}."): value}
        else:
            values[name] = value

    def _convert(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Every leaf by dotted name, converted to its type."""
        for name, leaf in self._leaves.items():
            value = values.get(name, leaf.default)
            if value is dataclasses.MISSING:
                shown = name.upper() if name in self.positional else f"--{name}"
                raise ValueError(f"{shown} is missing; try: {self.examples[0]}")
            if value is None or (leaf.is_mapping and not _is_mapping(value)):
                raise ValueError(f"{name} is {show(value)}; {leaf.advice}")
        # Mappings are kept as they are: jsonargparse would read text inside them, such as "1", as a number.
        mappings = {n: values.get(n, leaf.default) for n, leaf in self._leaves.items() if leaf.is_mapping}
        words = {name: get_args(leaf.type) for name, leaf in self._leaves.items()}
        typed = {n: yaml_text.as_word(v, words[n]) for n, v in values.items() if n not in mappings}
        for name, leaf in self._leaves.items():
            if leaf.type is Path and isinstance(typed.get(name), str):
                typed[name] = Path(typed[name])  # jsonargparse would read the text "?" as YAML
        try:
            converted = self._parser.parse_object(typed)
        except ArgumentError as error:
            raise ValueError(self._explain(error, typed)) from error
        except (OverflowError, TypeError, RecursionError) as error:
            raise ValueError(self._explain_crash(error, typed)) from error
        result = {name: mappings[name] if name in mappings else converted[name] for name in self._leaves}
        for name, value in result.items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(entry, str | Path) and "\0" in str(entry) for entry in numbers):
                raise ValueError(f"{name} is {show(str(value))}; give text without null characters")
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is {show(value)}; give a finite number")
        return result

    def _explain_crash(self, error: Exception, values: Mapping[str, Any]) -> str:
        """One line for values that made jsonargparse fail; names the one that does so by itself."""
        for name, value in values.items():
            try:
                self._parser.parse_object({name: value})
            except ArgumentError as own:
                return self._explain(own, values)
            except (OverflowError, TypeError, RecursionError):
                shown = show(value)
                shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
                return f"{name} is {shown}; {self._leaves[name].advice}"
        return f"the configuration cannot be read ({error})"

    def _explain(self, error: ArgumentError, values: Mapping[str, Any]) -> str:
        """One line for a value that jsonargparse could not convert."""
        match = re.search(r'[Kk]ey "([\w.]+)"', str(error))
        leaf = self._leaves.get(match[1]) if match else None
        if leaf is None:
            return " ".join(str(error).split())
        return f"{leaf.name} is {show(values.get(leaf.name))}; {leaf.advice}"


def _placeholder(leaf: Leaf) -> str:
    """A positional in the usage line."""
    name = leaf.name.upper()
    if leaf.is_container:
        return f"{name.removesuffix('S')} [{name.removesuffix('S')} ...]"
    return name if leaf.required else f"[{name}]"


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_TRAIN_OPTIONS = Options(
    RunConfig,
    program=f"{PROGRAM} train",
    examples=(
        f"{PROGRAM} train --config configs/quickstart.yaml",
        f"{PROGRAM} train --config configs/quickstart.yaml --policy.rho 0.1 --run_dir runs/rho_0.1",
        f"{PROGRAM} train --config configs/experiments/table2_resnet20_cifar10.yaml --dry_run",
        "accelerate launch launch/train.py --config configs/quickstart.yaml",
    ),
    reads_files=True,
    aliases={"log_every": "train.log_every"},
)


def parse(argv: Sequence[str]) -> RunConfig:
    """The configuration of a run from ``--config FILE.yaml`` and dotted overrides.

    Raises:
        ValueError: unknown key, wrong type or value, missing file; one line with advice.
    """
    return _TRAIN_OPTIONS.parse(argv)


def dump(config: Any) -> str:
    """A configuration tree as YAML, every leaf spelled out; ``parse`` of it gives an equal tree."""
    return yaml_text.dump(_plain(dataclasses.asdict(config)))


def flat_values(config: Any, section: str) -> dict[str, Any]:
    """The leaves of one section by dotted name, as ``Options.parse`` takes them for ``defaults``."""
    values = _plain(dataclasses.asdict(getattr(config, section)))
    return {f"{section}.{name}": value for name, value in values.items()}


def flat_tree(config: Any) -> dict[str, Any]:
    """Every leaf of a configuration tree by dotted name, as plain values; mappings are leaves."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": leaf for name, leaf in flat_tree(value).items()}
        else:
            flat[field.name] = _plain(value)
    return flat


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return str(node) if isinstance(node, Path) else node
