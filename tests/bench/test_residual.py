"""The bench of residual policies measures each of them against the dense network."""

from __future__ import annotations

from offload_sparse.bench.residual import run


def test_dense_streams_cost_most_and_shared_masks_least() -> None:
    ratios = run(quick=True).ratios
    flops = {
        p: ratios[f"residual.resnet20_cifar.{p}.flops_vs_dense"] for p in ("coupled", "filter", "internal")
    }
    assert 0 < flops["coupled"] < flops["filter"] < flops["internal"] < 1
    assert all(value > 0 for name, value in ratios.items() if name.endswith("step_vs_dense"))
