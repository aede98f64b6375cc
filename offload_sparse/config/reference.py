"""The configuration reference, from the dataclasses that the options are made of."""

from __future__ import annotations

from itertools import groupby

from offload_sparse.config.option_tree import Leaf, sections, show
from offload_sparse.config.parse import PROGRAM

_INTRODUCTION = f"""# Every option

Written by `{PROGRAM} config --markdown`; change the dataclasses, not this file. A YAML file names what it
changes, by sections (`policy:` and below it `rho: 0.1`) or by dotted names; on the command line every option
is `--section.name VALUE`. `{PROGRAM} config --config FILE.yaml` prints what a file comes to."""


def reference(tree: type) -> str:
    """Markdown: one table for each section of a configuration tree."""
    parts = [_INTRODUCTION]
    for section in sections(tree):
        for name, leaves in groupby(section.leaves, key=lambda leaf: leaf.name.rpartition(".")[0]):
            rows = [_row(leaf) for leaf in leaves]
            title = f"## `{name}`" if name else "## The run"
            parts.append("\n".join([title, "", f"{section.title}.", "", *_HEADER, *rows]))
    return "\n\n".join(parts) + "\n"


_HEADER = ("| option | values | default | what it does |", "|---|---|---|---|")


def _row(leaf: Leaf) -> str:
    text = leaf.help.replace("``", "`")
    cells = (f"`{leaf.name}`", f"`{leaf.metavar}`", f"`{show(leaf.default)}`", text[:1].upper() + text[1:])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
