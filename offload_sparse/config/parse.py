"""Command lines and YAML files into configuration trees, and back.

    defaults of the dataclasses < base files of a YAML < the YAML < a later --config < dotted overrides

jsonargparse makes the options of the dataclasses: names, types, defaults, help. Added here are files that
start from other files, dashes beside underscores, flags without a value, options of earlier versions, and one
line of advice for every mistake.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import shutil
import typing
from argparse import SUPPRESS, Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader

from offload_sparse.config import yaml_text
from offload_sparse.config.run import RunConfig
from offload_sparse.config.yaml_text import shortened

Tree = TypeVar("Tree")

PROGRAM = "offload-sparse"
LONGEST = 10_000
"""Most characters of a value."""

_ADVICE: dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"},
    **{list[str]: "a list of names such as [train, '2024']", list[float]: "a list such as [0.5, 0.25]"},
    **{dict: "a mapping such as {width: 64}", str | int | float: "text or a number"},
    list[int] | str: "widths such as [8, 8, 16], or the name of published ones",
    str | int: "a number such as 8 or <=8, or auto",
    float | Literal["auto"]: "a number, or auto",
}

set_loader("yaml_1.2", lambda text: yaml_text.parse(text, "a value"), exceptions=(ValueError,))


class MistakesError(ValueError):
    """Several mistakes, each of one line."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))
        self.lines = tuple(lines)


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(100, shutil.get_terminal_size().columns - 2))

    def _get_type_str(self, action: Action) -> None:
        """What an option takes is its placeholder."""

    def _format_action_invocation(self, action: Action) -> str:
        # jsonargparse lists its own "--name+" beside every list; here lists are given whole.
        return re.sub(r", --\S+\+ .*$", "", super()._format_action_invocation(action))


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise ArgumentError(None, message) from ex


@dataclass(frozen=True)
class _Given:
    """One value, and where it comes from: a file, or the command line where ``source`` is empty."""

    name: str
    value: Any
    source: str = ""


@dataclass(frozen=True)
class Options(Generic[Tree]):
    """The options of one command.

    Attributes:
        tree: dataclass whose leaves are the options; those without a default are given without their name.
        program: how the command is called.
        examples: command lines that work, for ``--help``.
        reads_files: whether ``--config FILE.yaml`` is accepted.
        positional: a leaf with a default that may be given without its name; a list takes all of them.
        first: options that ``--help`` shows, where ``--help all`` shows the others, too; empty for all."""

    tree: type[Tree]
    program: str
    examples: tuple[str, ...]
    reads_files: bool = False
    positional: str = ""
    first: tuple[str, ...] = ()

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Tree:
        """The configuration that a command line (behind the name of the command) asks for; ``defaults``, by
        dotted name, stand in for those of ``tree``. ``--help`` prints the help text and exits with 0. Raises
        ValueError: unknown key, wrong type or value, missing file; one line with advice. ``MistakesError``
        names every option of an earlier version."""
        if {"-h", "--help"} & set(argv):
            self.parser("all" in argv).print_help()
            raise SystemExit(0)
        files, overrides = self._split(argv)
        given = [_Given(name, value) for name, value in (defaults or {}).items()]
        for path in files:
            given += self._load(path)
        given += overrides
        self._check_names(given)
        try:
            mappings = self._mappings(given)
            others = [one for one in given if self._mapping_of(one.name) is None]
            found = self._reader.parse_args([self._token(one) for one in others])
        except ArgumentError as error:
            raise ValueError(self._explain(error, given)) from error
        for name in self.leaves:
            numbers = found[name] if isinstance(found[name], list) else [found[name]]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is {shortened(found[name])}; give a finite number")
        return _build(self.tree, {name: found[name] for name in self.leaves} | mappings)

    def places(self, argv: Sequence[str]) -> list[str]:
        """What a command line gives without a name, as it is; nothing is checked."""
        return [one.value for one in self._split(argv)[1] if not one.name]

    def parser(self, everything: bool = True) -> ArgumentParser:
        """The options as jsonargparse reads and explains them."""
        more = "" if everything or not self.first else f"`{self.program} --help all` lists all options\n\n"
        parser = _Parser(
            prog=self.program,
            epilog="\n".join([f"{more}examples:", *(f"  {example}" for example in self.examples)]),
            formatter_class=_HelpFormatter,
            exit_on_error=False,
            parser_mode="yaml_1.2",
        )
        if self.reads_files:
            text = "read this file; of several, later ones win; 'base: other.yaml' in it starts from that one"
            parser.add_argument("--config", metavar="FILE.yaml", help=text, default=SUPPRESS)
        parser.add_class_arguments(self.tree, None, as_positional=True)
        places = "".join(f" {action.dest.upper()}" for action in parser._get_positional_actions())
        places += f" [{self.positional.upper()} ...]" if self.positional else ""
        parser.usage = f"{self.program}{places}{' [--config FILE.yaml]' * self.reads_files} [--KEY VALUE ...]"
        for action in parser._actions:
            hidden = self.first and not everything and action.dest not in ("help", "config", *self.first)
            hidden = hidden or action.metavar == "CONFIG"  # jsonargparse reads a section from a file, too
            if action.option_strings and action.dest in self.leaves:
                action.metavar = action.metavar or type_name(self.leaves[action.dest])
            action.help = SUPPRESS if hidden else (action.help or "").replace("``", "`")
        for group in parser._action_groups:
            group.title = (group.title or "").replace("``", "`")
        return parser

    @cached_property
    def _reader(self) -> ArgumentParser:
        return self.parser()

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """Type of every option by dotted name."""
        return dict(_leaves(self.tree))

    def _split(self, argv: Sequence[str]) -> tuple[list[Path], list[_Given]]:
        """Configuration files, and every other argument, each in the order given."""
        files: list[Path] = []
        given: list[_Given] = []
        tokens = list(argv)
        while tokens:
            token = tokens.pop(0)
            name, equals, text = token.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not token.startswith("--"):
                name, text = "", token
            elif not equals:
                last = not tokens or tokens[0].startswith("--")
                flag = self.leaves.get(name) is bool
                if flag and (last or tokens[0].lower() not in ("true", "false")):
                    text = "true"
                elif not last:
                    text = tokens.pop(0)
                elif name in self.leaves or name == "config":
                    raise ValueError(f"--{name} needs a value; {_advice(self.leaves.get(name, Path))}")
            if name == "config" and self.reads_files:
                files.append(Path(text).expanduser())
            else:
                given.append(_Given(name, text))
        if self.positional and (places := [one.value for one in given if not one.name]):
            many = get_origin(self.leaves[self.positional]) is list
            value = places if many else " ".join(places)
            given = [*(one for one in given if one.name), _Given(self.positional, value)]
        return files, given

    def _load(self, path: Path, above: tuple[Path, ...] = ()) -> list[_Given]:
        """What a YAML file says, behind what its ``base`` files say."""
        resolved = Path(os.path.realpath(path))
        if resolved in above:
            chain = " -> ".join(p.name for p in (*above, resolved))
            raise ValueError(f"{path}: base files form a cycle ({chain}); remove one 'base'")
        content = yaml_text.read_keys(path)
        bases = content.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases) or len(bases) > 8:
            raise ValueError(f"{path}: base is {shortened(bases)}; give a path or a list of paths")
        below = (self._load(path.parent / Path(base).expanduser(), (*above, resolved)) for base in bases)
        return [*(one for file in below for one in file), *self._flat(content, str(path))]

    def _flat(self, node: Mapping[Any, Any], source: str, prefix: str = "") -> Iterator[_Given]:
        for key, value in node.items():
            name = f"{prefix}{key}".replace("-", "_")
            is_section = name not in self.leaves and self._mapping_of(name) is None
            if is_section and isinstance(value, Mapping):
                yield from self._flat(value, source, f"{name}.")
            elif not (value is None and any(known.startswith(f"{name}.") for known in self.leaves)):
                yield _Given(name, value, source)

    def _mapping_of(self, name: str) -> str | None:
        """The mapping that ``name`` is, or is an entry of: model.arguments for model.arguments.width."""
        found = (leaf for leaf, hint in self.leaves.items() if hint is dict)
        return next((leaf for leaf in found if name == leaf or name.startswith(f"{leaf}.")), None)

    def _mappings(self, given: Sequence[_Given]) -> dict[str, Any]:
        """The mappings as they are: jsonargparse would read texts in them, such as "1", as numbers."""
        found: dict[str, Any] = {}
        for one in given:
            name = self._mapping_of(one.name)
            if name is None:
                continue
            self._check(one)
            value = yaml_text.parse(one.value, one.name) if isinstance(one.value, str) else one.value
            if name != one.name:
                value = {**found.get(name, {}), one.name.removeprefix(f"{name}."): value}
            elif not isinstance(value, dict):
                raise ValueError(f"{name} is {shortened(value)}; {_advice(dict)}")
            found[name] = value
        return found

    def _check(self, one: _Given) -> None:
        hint, value = self.leaves.get(one.name), one.value
        if not _may_be(value, hint) or "\0" in str(value) or len(str(value)) > LONGEST:
            raise ValueError(f"{one.name} is {shortened(value)}; {_advice(hint)}")

    def _token(self, one: _Given) -> str:
        """The argument of a command line, for jsonargparse."""
        self._check(one)
        hint, value = self.leaves.get(one.name), one.value
        if hint == list[str] and isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
            value = [entry.strip() for entry in value.split(",")]  # tensorboard,wandb
        if hint in (int, float) and isinstance(value, str):
            value = yaml_text.number(value)  # jsonargparse would read numbers of YAML 1.1, such as 1:04
        text = value if isinstance(value, str) else yaml_text.dump(value, flow=True).strip()
        return f"--{one.name}={text}" if one.name else text

    def _check_names(self, given: Sequence[_Given]) -> None:
        replaced = []
        for name, shown in dict.fromkeys((one.name, one.source) for one in given if one.name):
            if name in self.leaves or self._mapping_of(name):
                continue
            line = f"{shown}: unknown key " if shown else "unknown option --"
            line += shortened(name)
            if name not in _replaced() or not self.reads_files:
                raise ValueError(f"{line}; {self._closest(name, dashes='' if shown else '--')}")
            replaced.append(f"{line}; {_replaced()[name]}")
        if replaced:
            raise MistakesError(replaced)

    def _closest(self, name: str, dashes: str) -> str:
        below = [known for known in self.leaves if known.startswith(f"{name}.")]
        if below:
            return f"name a key of this section, such as {dashes}{below[0]}"
        name, last = name[-100:], {known: known.rsplit(".", 1)[-1] for known in self.leaves}
        short = name.rsplit(".", 1)[-1]
        found = difflib.get_close_matches(name, self.leaves, 1, 0.8)
        found = found or [known for known, end in last.items() if end == short]
        found = found or difflib.get_close_matches(name, self.leaves, 1, 0.6)
        close = difflib.get_close_matches(short, last.values(), 1, 0.8)
        found = found or [known for known, end in last.items() if end in close]
        if found:
            return "did you mean " + " or ".join(dashes + known for known in found[:3]) + "?"
        return f"`{self.program} --help` lists all keys"

    def _explain(self, error: ArgumentError, given: Sequence[_Given]) -> str:
        """One line for a value that jsonargparse could not convert."""
        match = re.search(r'[Kk]ey "([\w.]+)"', str(error))
        values = {one.name: one.value for one in given}
        if match and match[1] in values:
            return f"{match[1]} is {shortened(values[match[1]])}; {_advice(self.leaves[match[1]])}"
        return f"{' '.join(str(error).split())}; try: {self.examples[0]}"


def _leaves(tree: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(tree)
    for field in dataclasses.fields(tree):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, dict if get_origin(hint) is dict else hint


def _build(tree: Callable[..., Tree], values: Mapping[str, Any], prefix: str = "") -> Tree:
    """An instance of ``tree`` from its leaves by dotted name."""
    hints = typing.get_type_hints(tree)
    arguments = {}
    for field in dataclasses.fields(tree):  # type: ignore[arg-type]
        name, hint = prefix + field.name, hints[field.name]
        is_section = dataclasses.is_dataclass(hint)
        arguments[field.name] = _build(hint, values, f"{name}.") if is_section else values[name]
    return tree(**arguments)


def _may_be(value: Any, hint: Any) -> bool:
    """Whether a value from a file or a command line may become one of this type; text may become any."""
    if isinstance(value, dict):
        return hint in (dict, None) and all(isinstance(key, str) for key in value)
    if isinstance(value, list):
        return hint is None or any(get_origin(kind) is list for kind in (hint, *get_args(hint)))
    return isinstance(value, str) or (value is not None and hint not in (str, Path))


def type_name(hint: Any) -> str:
    """What an option takes, as a placeholder."""
    named: dict[Any, str] = {int: "INTEGER", float: "NUMBER", Path: "PATH", dict: "{KEY: VALUE, ...}"}
    named |= {float | Literal["auto"]: "NUMBER or auto"}
    return named.get(hint, "TEXT")


def _advice(hint: Any) -> str:
    """What the user should give instead of a value that does not fit."""
    if get_origin(hint) is Literal:
        return "give one of " + ", ".join(map(str, get_args(hint)))
    return f"give {_ADVICE.get(hint, 'another value')}"


@cache
def _replaced() -> dict[str, str]:
    """What replaces an option of an earlier version, by its dotted name."""
    return yaml_text.read_keys(Path(__file__).with_name("replaced.yaml"))


def dump(config: Any) -> str:
    """A configuration tree as YAML, every leaf spelled out; ``Options.parse`` of it gives an equal tree."""
    return yaml_text.dump(_plain(dataclasses.asdict(config)))


def flat_tree(config: Any) -> dict[str, Any]:
    """Every leaf of a configuration tree by dotted name, as plain values; mappings are leaves."""
    return {name: _plain(attrgetter(name)(config)) for name, _ in _leaves(type(config))}


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return str(node) if isinstance(node, Path) else node


RUN_OPTIONS = Options(
    RunConfig,
    program=f"{PROGRAM} train",
    examples=(
        f"{PROGRAM} train --config configs/quickstart.yaml",
        f"{PROGRAM} train --config configs/quickstart.yaml --policy.rho 0.1 --run_dir runs/rho_0.1",
        f"{PROGRAM} train --config configs/zhou2021/table2_resnet20_cifar10.yaml --dry_run",
        "accelerate launch launch/train.py --config configs/quickstart.yaml",
    ),
    reads_files=True,
    first=(
        *("method", "run_dir", "overwrite", "resume", "dry_run", "quiet", "compile", "trackers"),
        *("model.name", "model.arguments", "model.weights", "data.name", "data.validation"),
        *("data.batch_size", "data.image_size", "data.num_workers", "data.limit", "policy.rho"),
        *("policy.search", "round.k", "store.tier", "optim.name", "optim.lr", "optim.weight_decay"),
        *("train.epochs", "train.precision", "train.seed"),
    ),
)


def parse(argv: Sequence[str]) -> RunConfig:
    """The configuration of a run from ``--config FILE.yaml`` and dotted overrides; see ``Options.parse``."""
    return RUN_OPTIONS.parse(argv)
