"""Figures on the standard output, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def show(figures: Mapping[str, Any], json_wanted: bool) -> None:
    """Print figures as one JSON object, or as a table of two columns."""
    if json_wanted:
        from offload_sparse.export.json_values import json_value

        print(json.dumps(json_value(figures), allow_nan=False))
        return
    from rich.table import Table

    from offload_sparse.run.terminal import console

    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console().print(table)
