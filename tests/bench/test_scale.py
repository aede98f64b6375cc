"""The model of many GPUs is plain arithmetic on its constants."""

from __future__ import annotations

import pytest

from offload_sparse.bench import scale
from offload_sparse.bench.scale import Cluster, Constants, all_reduce_seconds, efficiency, round_seconds
from offload_sparse.engine.losses import TAIL

CONFIG = Cluster(bus_gbs=1, link_gbs=10, network_gbs=2, host_gbs=4, latency_us=0, gpus_per_node=4)
CONSTANTS = Constants(0.1, gradient_bytes=8e9, round_bytes=24e9, trained_bytes=16e9, k=10)


def test_an_all_reduce_within_a_node_is_a_ring() -> None:
    assert all_reduce_seconds(4, 8e9, CONFIG) == pytest.approx(2 * 3 / 4 * 8 / 10)
    assert all_reduce_seconds(1, 8e9, CONFIG) == 0


def test_between_nodes_every_gpu_sends_its_part_only() -> None:
    within = 2 * 3 / 4 * 8 / 10
    assert all_reduce_seconds(8, 8e9, CONFIG) == pytest.approx(within + 2 * 1 / 2 * (8 / 4) / 2)


def test_scalars_go_up_and_down_a_tree() -> None:
    slow = Cluster(latency_us=1e6, gpus_per_node=8)
    assert all_reduce_seconds(8, 0.0, slow) == pytest.approx(2 * 3)
    assert all_reduce_seconds(64, 0.0, slow) == pytest.approx(2 * 3 + 2 * 3)


def test_a_round_is_its_steps_one_gather_and_one_scatter() -> None:
    steps = 10 * (0.1 + all_reduce_seconds(4, 8e9, CONFIG))
    bus = (24 + 16) / 4 / 1
    gather = 3 / 4 * 24 / 10
    assert round_seconds(4, CONSTANTS, CONFIG) == pytest.approx(steps + bus + gather)


def test_a_local_round_brings_its_subnet_to_the_owners() -> None:
    """By way of the hosts, as fast as these and what is between them."""
    steps = 10 * (0.1 + all_reduce_seconds(4, 4.0 * TAIL, CONFIG))
    bus, gather, owners = 24 / 4 + 16, 3 / 4 * 24 / 10, 3 / 4 * 16 / 4
    assert round_seconds(4, CONSTANTS, CONFIG, "round") == pytest.approx(steps + bus + gather + owners)
    steps, bus = 10 * (0.1 + all_reduce_seconds(8, 4.0 * TAIL, CONFIG)), 24 / 8 + 16
    gather, owners = gather + 1 / 2 * 24 / 4 / 2, 7 / 8 * 16 / 2
    assert round_seconds(8, CONSTANTS, CONFIG, "round") == pytest.approx(steps + bus + gather + owners)


def test_efficiency_is_the_share_that_computes() -> None:
    assert efficiency(4, CONSTANTS, CONFIG) == pytest.approx(1.0 / round_seconds(4, CONSTANTS, CONFIG))
    free = Constants(0.1, 0.0, 0.0, 0.0, 10)
    assert efficiency(512, free, CONFIG) == pytest.approx(1.0)


def test_the_table_holds_measured_and_modelled_rows_and_all_assumptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "measure", lambda world_size, *_: {1: 1.0, 2: 0.8}[world_size])
    monkeypatch.setattr(scale, "modelled_constants", lambda config: CONSTANTS)
    monkeypatch.setattr(scale, "Cluster", lambda: CONFIG)
    result = scale.run(True)
    assert result.ratios["scale.p2_vs_p1"] == 1.6
    assert {f"scale.model.n{n}.efficiency" for n in scale.GPUS} < set(result.ratios)
    for link in scale.LINKS:
        assert {f"scale.model.{link}.{sync}.n8" for sync in ("step", "round")} < set(result.ratios)
    assert all(len(row) == len(result.header) for row in result.table)
    text = "\n".join(str(row[0]) for row in result.table)
    for value in ("1 GB/s", "10 GB/s", "2 GB/s", "4 GPUs per node", "K = 10"):
        assert value in text


@pytest.mark.slow
def test_one_process_and_two_are_measured() -> None:
    assert min(scale.measure(n, 0.125, 2) for n in (1, 2)) > 0
