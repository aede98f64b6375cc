"""Variance of every estimator of the keep probabilities' gradient, on the same checkpoint of a run.

Masks are drawn from the checkpoint's p(m|s), in the pairs that each estimator needs, and the losses of their
subnets measured on one batch (Zhou et al. 2021, Figure 3, right). The variance is the total one,
E|Hg|² - |E Hg|², with the preconditioner H. Control variates come from masks that are used for nothing
else. From the independent pairs follow, too (Figure 4 and equations 6 and 7)

    V(s) = E (L(m) - L(m'))²      V_max(s) = max over j, m_j of the same given m_j      E L(m)²
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import default_device, session_of
from offload_sparse.bench.options import VarianceConfig
from offload_sparse.channels.channel_map import Group
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.probing import losses_of
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.estimators import CONTROLLED, ESTIMATORS, Comparison, precondition, regressed
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.run.trainer import classification_loss
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.loader import Batch
from offload_sparse.workloads.data.normalise import Normalise, normalise_for
from offload_sparse.workloads.data.source import load_splits
from offload_sparse.workloads.models import build_model

_BATCH, _K = 128, 10
_LEAST = 10
"""Masks that a conditional expectation is averaged over at least."""

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
"""bool[n, C], bool[n, C], float64[n, 1], float64[n, 1]: masks, references, and their losses."""


def run(config: VarianceConfig) -> BenchResult:
    """After 600 steps, on 200 pairs; ``quick`` takes 20 of either."""
    data = DataConfig(
        name=config.data or DataConfig.name,
        splits=["train", "validation" if config.data else "test"],
        batch_size=_BATCH,
        limit=2000 if config.quick else 20_000,
    )
    splits = load_splits(data)
    images = ImageSet(splits.train, data)
    steps, pairs = (20, 20) if config.quick else (600, 200)
    steps, pairs = config.steps or steps, config.pairs or pairs
    drawn = _batches(images, normalise_for(images, data))
    shape = next(drawn).images.shape[1:]
    factory = partial(build_model, config.model, splits.num_classes, *shape[:2])
    rounds = RoundConfig(k=_K, freeze_at=1.0, prefetch=False)
    session = session_of(factory, shape, config.rho, rounds, OptimConfig(lr=0.05))
    for batch in islice(drawn, max(1, steps // _K) * _K):
        session.step(partial(classification_loss, batch=batch))
    found = measure(session, next(drawn), pairs)
    variance = found["variance"]
    ratios = {f"variance.{name}": found[name] for name in ("V", "V_max", "mean_square_loss")}
    rows = []
    for name, value in variance.items():
        shares = {paper: value / variance[paper] for paper in ("pge", "vr_pge")}
        ratios |= {f"variance.{name}.vs_{paper}": share for paper, share in shares.items()}
        rows.append([name, value, *shares.values()])
    raw = {"step": session.steps_done, "entropy": session.policy.entropy} | found
    raw |= {"pairs": pairs, "atoms": session.channel_map.num_atoms}
    raw |= {"model": config.model, "rho": config.rho, "images": len(images), "batch": _BATCH}
    return BenchResult(ratios, raw, ["estimator", "variance", "/ pge", "/ vr_pge"], rows)


def measure(session: SparseOffload, batch: Batch, pairs: int) -> dict[str, Any]:
    """The variances at the session's present state, which is between two rounds and which nothing changes,
    over as many pairs of independent masks, and of antithetic ones; losses are those of ``batch``."""
    s = session.policy.s
    independent, antithetic = (draw_pairs(session, batch, name, pairs) for name in ("rloo", CONTROLLED))
    groups = session.channel_map.groups
    variance = {
        name: _variance(name, antithetic if name == CONTROLLED else independent, s, groups)
        for name in ESTIMATORS
    }
    return {"variance": variance} | spread_of_losses(independent)


def draw_pairs(session: SparseOffload, batch: Batch, estimator: str, count: int) -> Pairs:
    """Pairs from the session's p(m|s), as an estimator needs them, and the losses of their subnets."""
    sampler = MaskPolicy(
        PolicyConfig.paper(rho=session.policy.config.rho, estimator=estimator),
        session.channel_map.groups,
        session.steps_done,
        session.cost,
    )
    state = sampler.state_dict()
    state["s"] = session.policy.s
    sampler.load_state_dict(state)
    masks = [sampler.sample(round) for round in range(count)]
    flat = [mask for pair in masks for mask in pair]
    closures = [partial(classification_loss, batch=batch)]
    losses = losses_of(flat, closures, session.transfers, session.forward, session.ranks)
    losses = losses.view(count, 2)
    m, m_ref = (torch.stack(side) for side in zip(*masks, strict=True))
    return m, m_ref, losses[:, :1], losses[:, 1:]


def spread_of_losses(pairs: Pairs) -> dict[str, float]:
    """V(s), V_max(s) and E L², from independent pairs.

    Every mask is compared with every reference. V_max is taken over the values of atoms that at least
    ``_LEAST`` masks have."""
    masks, _, losses, references = pairs
    squares = ((losses - references.T) ** 2).mean(1)
    largest = float(squares.mean())
    for kept in (masks, ~masks):
        counts = kept.sum(0).to(torch.float64)
        given = (kept.to(torch.float64) * squares[:, None]).sum(0) / counts
        enough = counts >= _LEAST
        largest = max(largest, float(given[enough].max()) if bool(enough.any()) else largest)
    mean_square = float((torch.cat([losses, references]) ** 2).mean())
    return {"V": float(squares.mean()), "V_max": largest, "mean_square_loss": mean_square}


def _variance(name: str, pairs: Pairs, s: Tensor, groups: Sequence[Group]) -> float:
    """Total variance of H g over the second half of the pairs; the first half serves the control variate."""
    half = len(pairs[0]) // 2
    control = None
    if name == CONTROLLED:
        m, m_ref, loss, reference = (part[:half] for part in pairs)
        control = regressed(loss - reference, m.to(s.dtype) - m_ref.to(s.dtype), groups)
    m, m_ref, loss, reference = (part[half:] for part in pairs)
    g = ESTIMATORS[name](Comparison(loss, reference, m, m_ref, s, control=control))
    return float(precondition(g, s).var(0).sum())


def _batches(images: ImageSet, normalise: Normalise) -> Iterator[Batch]:
    """Random training images, where subnets compute."""
    generator, device = torch.Generator().manual_seed(0), default_device()
    normalise = normalise.to(device)
    while True:
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        yield Batch(normalise(images.gather(chosen)), images.labels[chosen].to(device), chosen)
