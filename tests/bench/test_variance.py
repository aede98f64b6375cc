"""The bench of variances: its keys, and what is known of the figures behind them."""

from __future__ import annotations

import pytest
import torch

from offload_sparse.bench import variance
from offload_sparse.bench.options import VarianceConfig
from offload_sparse.policy.estimators import ESTIMATORS


def test_every_estimator_has_its_variance_relative_to_both_of_the_paper() -> None:
    config = VarianceConfig(quick=True, model="offload_sparse/lenet_300_100", steps=10, pairs=16)
    ratios = variance.run(config).ratios
    for name in ESTIMATORS:
        assert ratios[f"variance.{name}.vs_pge"] > 0
        assert ratios[f"variance.{name}.vs_vr_pge"] > 0
    assert ratios["variance.vr_pge.vs_pge"] < 0.1
    assert ratios["variance.rloo.vs_vr_pge"] < 0.8
    assert ratios["variance.V"] <= ratios["variance.V_max"] < ratios["variance.mean_square_loss"]


def test_the_largest_conditional_spread_is_that_of_the_atom_that_matters() -> None:
    """L(m) = 4 if atom 0 is dropped, else 1 (and m' likewise); atom 1 changes nothing."""
    kept, dropped = torch.ones(30, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    masks = torch.stack([torch.cat([kept, dropped]), torch.arange(40) % 2 == 0], dim=1)
    losses = torch.where(masks[:, :1], 1.0, 4.0).double()
    found = variance.spread_of_losses((masks, masks, losses, losses))
    assert found["V"] == pytest.approx(2 * 0.75 * 0.25 * 9)
    assert found["V_max"] == pytest.approx(0.75 * 9)
    assert found["mean_square_loss"] == pytest.approx(0.75 + 0.25 * 16)
