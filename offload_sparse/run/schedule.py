"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from offload_sparse.engine.config import OptimConfig

WARMUP_SHARE = 0.25
"""Most of a cycle that is warm-up: the widths move where the rate has come down, which takes time."""


def learning_rate(
    config: OptimConfig,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    cycle: bool = False,
    before: int = 0,
) -> float:
    """Linear warm-up to ``config.lr``, then a cosine to zero at ``total_steps``, a constant, or steps down;
    after ``step`` optimizer steps of a run, or of one ``cycle`` of its search with so many steps ``before``
    it. Milestones are epochs of the run."""
    warmup = config.warmup_epochs * steps_per_epoch
    if cycle:
        warmup = min(warmup, WARMUP_SHARE * total_steps)
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        passed = sum(before + step >= epoch * steps_per_epoch for epoch in config.milestones)
        return config.lr * 0.1**passed
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, progress)))
