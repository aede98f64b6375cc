"""What a run's network takes in memory, part by part, beside the dense network: from the plan."""

from __future__ import annotations

import logging
from dataclasses import replace

from offload_sparse.inspect.report.run_data import RunData

logger = logging.getLogger(__name__)

ROWS = ("host store", "weights, gradients, slots", "activations", "device")


def planned_memory(run: RunData) -> list[list[float]] | None:
    """Bytes of one rank for each part of ``ROWS``: of a finished run of ``sparse_offload``, and of training
    the dense network on the device with the same batch and optimizer; None of other runs, or where none can
    be planned."""
    if run.config.get("method") != "sparse_offload" or run.structure is None:
        return None
    images = run.structure.preprocessing
    if not images.shape:
        return None
    from offload_sparse.config import parse
    from offload_sparse.run.log import CONFIG_FILE
    from offload_sparse.run.plan.machine import Machine
    from offload_sparse.run.plan.plan import Planner
    from offload_sparse.workloads.data.loader import DeclaredData

    try:
        config = parse.parse(["--config", str(run.folder / CONFIG_FILE)])
        # Of the images only their number is not known, which says no more than that of the steps.
        train = replace(config.train, max_steps=int(run.summary.get("steps", 0)))
        channels, height, width = images.shape
        data = DeclaredData(len(images.class_names), channels, (height, width), config.data.batch_size)
        ranks = int(run.summary.get("world_size", 1))
        on_device = None if run.summary.get("device") == "cpu" else 1 << 62
        machine = Machine(ranks, ranks, 1 << 62, on_device)
        planner = Planner.of(replace(config, train=train), data, machine)
        memories = [each.memory(machine) for each in (planner, planner.with_method("dense"))]
    except ValueError as error:
        logger.warning("%s cannot be planned: %s", run.name, error)
        return None
    return [[m.store + m.files, m.subnets, m.activations, m.device] for m in memories]
