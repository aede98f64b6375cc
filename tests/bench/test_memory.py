"""A rank never holds much more than its share: measured on a network of 400 MB, by the kernel's own peak
counter.
"""

from __future__ import annotations

from offload_sparse.bench.memory import measure
from tests.support.ranks import run_ranks


def test_peak_of_a_rank_is_its_shard_subnets_and_activations() -> None:
    """From building the model to the last scatter, within 20 %; weights of more than 400 MB, momentum as much
    again.
    """
    for figures in run_ranks(2, measure, 2.6, limit=280.0):
        assert figures["full_model"] / 2 >= 400e6
        assert figures["shard"] < 0.51 * figures["full_model"] + 1e6
        assert figures["peak"] < 1.2 * figures["predicted"], figures
