"""``offload-sparse config``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload_sparse.config import parse as arguments
from offload_sparse.config.parse import PROGRAM, Options
from offload_sparse.config.run import RunConfig


@dataclass
class ConfigConfig(RunConfig):
    """Print the configuration that files and options come to, as a run would keep it in config.yaml.

    Attributes:
        markdown: print the reference of all options instead.
    """

    markdown: bool = False


_OPTIONS = Options(
    ConfigConfig,
    f"{PROGRAM} config",
    (
        f"{PROGRAM} config --config configs/quickstart.yaml --policy.rho 0.1",
        f"{PROGRAM} config --markdown > configs/REFERENCE.md",
    ),
    reads_files=True,
)


def config(argv: Sequence[str]) -> int:
    """Print what files and options come to, or the reference of all options."""
    found = _OPTIONS.parse(argv)
    if found.markdown:
        from offload_sparse.config.reference import reference

        print(reference(RunConfig), end="")
        return 0
    text = arguments.dump(found)
    print(
        "".join(line for line in text.splitlines(keepends=True) if not line.startswith("markdown:")), end=""
    )
    return 0
