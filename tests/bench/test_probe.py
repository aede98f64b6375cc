"""The bench of probes times the same number of forward passes on both sides."""

from __future__ import annotations

from offload_sparse.bench.probe import measure


def test_both_sides_are_timed_per_forward_pass() -> None:
    figures = measure("vgg19", pairs=1, repetitions=2)
    assert {side: len(values) for side, values in figures.items()} == {"plain": 2, "probe": 2}
    assert all(value > 0 for values in figures.values() for value in values)
