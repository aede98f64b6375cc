"""``offload-sparse bench``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from offload_sparse.bench.options import BenchConfig, options_of
from offload_sparse.config.parse import PROGRAM, Options

_EXAMPLES = (
    f"{PROGRAM} bench",
    f"{PROGRAM} bench memory --json memory.json",
    f"{PROGRAM} bench peers --help",
)


def bench(argv: Sequence[str]) -> int:
    """Measure one of the figures that the README quotes, or list them."""
    tree = options_of(argv)
    config = Options(tree, f"{PROGRAM} bench", _EXAMPLES, positional=("name",)).parse(argv)
    from offload_sparse.bench import contract

    if not config.name:
        for name, line in contract.available().items():
            print(f"{name:<16}{line}")
        return 0
    run = contract.load(config.name)
    result = run(config.quick) if type(config) is BenchConfig else run(config.quick, config)
    contract.print_result(result, config.name)
    if config.json:
        contract.write(result, shlex.join([PROGRAM, "bench", *argv]), Path(config.json))
    return 0
