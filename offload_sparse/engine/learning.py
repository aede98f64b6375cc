"""What a session learns from its steps, and what the subnets that it draws cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.engine.draw import Draw, pair_on
from offload_sparse.engine.rounds import StepRecord
from offload_sparse.policy.estimators import paired_losses
from offload_sparse.policy.mask_policy import MaskPolicy


def learn(policy: MaskPolicy, record: StepRecord, draw: Draw, round: int, world_size: int) -> None:
    """One step on s from the losses of one optimizer step.

    Args:
        policy: whose s is moved.
        record: with the losses of both subnets; of every rank where ranks have references of their own.
        draw: the masks of the round.
        round: its number.
        world_size: number of ranks.
    """
    assert record.compared is not None
    if record.losses is None:
        policy.update(*record.compared, draw[0], draw[1], round)
        return
    references = [pair_on(draw, rank)[1] for rank in range(world_size)]
    policy.update_from_ranks(paired_losses(*record.losses), torch.stack([draw[0], *references]), round)


def mean_cost(masks: Sequence[Tensor], cost: CostModel) -> tuple[float, float]:
    """Mean parameters and FLOPs of the subnets of ``masks`` (bool[C]), as shares of the full network."""
    parameters = sum(cost.parameters(mask) for mask in masks) / len(masks)
    flops = sum(cost.flops(mask) for mask in masks) / len(masks)
    return parameters / cost.dense_parameters, flops / cost.dense_flops
