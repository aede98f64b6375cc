"""All checks, in the order in which they are told."""

from __future__ import annotations

import logging
from pathlib import Path

from offload_sparse.inspect.doctor.devices import check_devices
from offload_sparse.inspect.doctor.finding import Finding
from offload_sparse.inspect.doctor.launch import check_launch
from offload_sparse.inspect.doctor.software import check_software
from offload_sparse.inspect.doctor.system import check_system


def examine(run_dir: Path) -> list[Finding]:
    """Every finding about this machine.

    Args:
        run_dir: where runs would be written.
    """
    import torch

    logger = logging.getLogger("offload_sparse")
    level = logger.level
    logger.setLevel(logging.ERROR)  # findings say what warnings would
    try:
        return [
            *check_software(),
            *check_devices(),
            *check_system(run_dir, torch.cuda.is_available()),
            *check_launch(),
        ]
    finally:
        logger.setLevel(level)
