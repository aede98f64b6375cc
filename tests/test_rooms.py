"""The plan of the package: arrows between rooms fall, no circles, and no module name stands twice."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload_sparse

PACKAGE = Path(offload_sparse.__file__).parent
FLOORS = (
    ("channels",),
    ("workloads", "policy", "store"),
    ("export",),
    ("engine",),
    ("config",),
    ("methods",),
    ("run",),
    ("inspect", "bench"),
    ("cli",),
)
"""From the ground up. A room knows those of lower floors, never one of its own floor."""
LIBRARY = ("channels", "policy", "store", "export", "engine")
APPLICATION = ("workloads", "config", "methods", "run", "inspect", "cli", "bench")
BY_NAME = {("export", "workloads")}
"""The one place where the library asks the application: a network that a file knows by its name."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, at_import_only: bool = False) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in the file; or only those it imports when it is
    imported itself (neither inside functions nor for the type checker).
    """
    tree = ast.parse(path.read_text())
    if at_import_only:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        hidden = {id(inner) for node in [*functions, *checks] for inner in ast.walk(node)}
    else:
        hidden = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module: str) -> str:
    """The room of a module; empty for the package itself and for libraries of others."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else ""


ROOMS = sorted({room(name) for name in MODULES} - {""})


def test_every_folder_is_a_room_of_the_plan() -> None:
    assert sorted(name for floor in FLOORS for name in floor) == ROOMS


@pytest.mark.parametrize("name", ROOMS)
def test_arrows_fall(name: str) -> None:
    """Imports inside functions count, too: they are arrows that only hide."""
    height = {each: number for number, floor in enumerate(FLOORS) for each in floor}
    risen = [
        f"{module} -> {target}"
        for module, path in MODULES.items()
        if room(module) == name
        for target in imports(path)
        if room(target) not in ("", name) and height[room(target)] >= height[name]
    ]
    assert not risen


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_does_not_know_the_application(name: str) -> None:
    known = [
        f"{module} -> {target}"
        for module, path in MODULES.items()
        if room(module) == name
        for target in imports(path)
        if room(target) in APPLICATION and (name, room(target)) not in BY_NAME
    ]
    assert not known


def test_channels_and_policy_know_neither_ranks_nor_files() -> None:
    for module, path in MODULES.items():
        if room(module) in ("channels", "policy"):
            text = path.read_text()
            assert "torch.distributed" not in text, module
            assert "open(" not in text, module


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count here as well, so that no circle is merely postponed."""
    arrows = {name: {t for t in imports(path) if t in MODULES} - {name} for name, path in MODULES.items()}
    reach: dict[str, set[str]] = {}

    def reachable(name: str) -> set[str]:
        if name not in reach:
            seen, stack = set(), list(arrows[name])
            while stack:
                if (top := stack.pop()) not in seen:
                    seen.add(top)
                    stack += arrows[top]
            reach[name] = seen
        return reach[name]

    assert not [name for name in MODULES if name in reachable(name)]


def test_no_module_name_stands_twice() -> None:
    """``__init__`` and ``__main__`` are Python's, ``config`` is the branch of each room, a command is named
    after what it shows.
    """
    names = Counter(
        name.rsplit(".", 1)[-1]
        for name, path in MODULES.items()
        if not path.stem.startswith("__") and path.stem != "config" and room(name) not in ("cli", "bench")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_modules_are_named_by_a_noun_of_their_own() -> None:
    vague = {"utils", "helpers", "misc", "common", "tools"}
    assert not [name for name in MODULES if name.rsplit(".", 1)[-1] in vague]


def test_tests_do_not_import_tests() -> None:
    """What several tests need is in ``conftest`` or in ``tests/support``."""
    folder = Path(__file__).parent
    taken = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                whole = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                taken += [f"{path.name} -> {m}" for m in whole if ".test_" in m]
    assert not taken


def test_names_of_tests_are_short() -> None:
    """Under 70 characters; a docstring holds the sentence that needs more."""
    names = {
        node.name
        for path in Path(__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert sorted(name for name in names if len(name) >= 70) == []


def test_an_installation_holds_the_files_that_are_read() -> None:
    """Also one that is no link to this folder."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["offload_sparse"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*.*") if path.suffix in {".parquet", ".yaml", ".typed"}}
    assert files
    assert packaged >= files
