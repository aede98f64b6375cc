"""What a run's network takes in memory, part by part, beside the dense network: from the plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from offload_sparse.inspect.report.run_data import RunData

logger = logging.getLogger(__name__)

ROWS = ("host store", "weights, gradients, slots", "activations", "device")


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes of one rank by name of the part, of ``ROWS``.

    Attributes:
        ours: of the run.
        dense: of training the dense network on the device, with the same batch and optimizer.
    """

    ours: dict[str, float]
    dense: dict[str, float]


def planned_memory(run: RunData) -> PlannedMemory | None:
    """The plan of a finished run of ``sparse_offload``; None of others, or where none can be made."""
    shape, classes = run.image_shape, run.classes
    if run.config.get("method") != "sparse_offload" or not shape:
        return None
    from offload_sparse.config import parse
    from offload_sparse.engine.optimizer import slot_names
    from offload_sparse.run.plan.dry_run import structure_of
    from offload_sparse.run.plan.machine import Machine
    from offload_sparse.run.plan.plan import Planner
    from offload_sparse.workloads.data.loader import DeclaredData

    try:
        config = parse.parse(["--config", str(run.config_file)])
        data = DeclaredData(classes, shape[0], shape[1], config.data.batch_size)
        planner = Planner(config, data, structure_of(config, data))
        ranks = int(run.summary.get("world_size", 1))
        on_device = None if run.summary.get("device") == "cpu" else 1 << 62
        machine = Machine(ranks, ranks, 1 << 62, on_device)
        ours, dense = planner.memory(machine), planner.with_rho(1.0).memory(machine)
        numbers = sum(p.numel() * p.element_size() for p in planner.structure.model.parameters())
        weights = numbers * (2 + len(slot_names(config.optim)))
    except ValueError as error:
        logger.warning("%s cannot be planned: %s", run.name, error)
        return None
    store = ours.store + ours.files
    values = (store, ours.subnets, ours.activations, ours.device)
    beside = (0, weights, dense.activations, weights + dense.activations)
    return PlannedMemory(*(dict(zip(ROWS, map(float, row), strict=True)) for row in (values, beside)))
