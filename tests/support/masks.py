"""All masks of a few atoms with their probabilities, and the gradient that estimators are judged by."""

import itertools

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group


def groups_of(*sizes: int) -> list[Group]:
    """Groups g0, g1, … of these sizes, one behind the other."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Group(f"g{i}", start, size) for i, (start, size) in enumerate(zip(starts, sizes, strict=True))]


def vector(*values: float) -> Tensor:
    """float64[n]."""
    return torch.tensor(values, dtype=torch.float64)


def all_masks(atoms: int) -> Tensor:
    """bool[2^C, C]."""
    return torch.tensor(list(itertools.product([False, True], repeat=atoms)))


def probabilities_of(masks: Tensor, s: Tensor) -> Tensor:
    """p(m | s) of each mask: float64[2^C], differentiable in s."""
    return torch.where(masks, s, 1 - s).prod(dim=1)


def index_of(masks: Tensor) -> Tensor:
    """The place of each mask bool[..., C] in ``all_masks``."""
    return (masks.long() * 2 ** torch.arange(masks.shape[-1] - 1, -1, -1)).sum(-1)


def enumerated_gradient(masks: Tensor, losses: Tensor, s: Tensor) -> Tensor:
    """d/ds_c E[L] = E[L | m_c = 1] - E[L | m_c = 0]."""
    p = probabilities_of(masks, s)
    given_kept = [(p * losses)[masks[:, c]].sum() / s[c] for c in range(len(s))]
    given_dropped = [(p * losses)[~masks[:, c]].sum() / (1 - s[c]) for c in range(len(s))]
    return torch.stack(given_kept) - torch.stack(given_dropped)
