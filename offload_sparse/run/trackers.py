"""Experiment trackers: those that accelerate knows by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS_FOLDER = "trackers"
"""Folder in that of the run, for trackers that write files."""

_PROJECT = "offload_sparse"
_PACKAGES = {"comet_ml": "comet-ml", "aim": "'aim<4'"}
"""What is installed under another name than the tracker's."""


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that accelerate knows every tracker and that its package is installed (accelerate itself
    passes over one that is not).

    Raises:
        ValueError: it does not, or it is not; says what to install.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"trackers names {name!r}, which accelerate does not know; give some of {known}")
        if name not in available:
            package = _PACKAGES.get(name, name)
            raise ValueError(
                f"trackers names {name}, which is not installed; run: pip install {package} "
                "(or choose others with --trackers, none with --trackers [])"
            )


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Begin to track a run, with its settings."""
    if config.trackers:
        settings = arguments.flat_tree(config)
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        accelerator.init_trackers(_PROJECT, config=plain)
