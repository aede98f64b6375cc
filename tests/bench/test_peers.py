"""Every peer trains a tiny network in a process of its own and has its figures, or its reason."""

from __future__ import annotations

import importlib.util

import pytest

from offload_sparse.bench import peers
from offload_sparse.bench.contenders import CONTENDERS, build_network
from offload_sparse.bench.options import PeersConfig
from offload_sparse.bench.peers import measure, resolve, summary

TINY = resolve(PeersConfig("peers", quick=True, model="offload_sparse/vgg_small", width=0.5, k=4))
FIGURES = {"step_seconds", "device_bytes", "host_bytes", "bus_bytes"}
FULL = sum(4 * p.numel() for p in build_network(TINY).parameters())
"""Bytes of the weights of the tiny network."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)


def figures_of(name: str) -> dict[str, float]:
    (figures,) = measure(name, TINY)
    assert set(figures) == FIGURES
    assert figures["step_seconds"] > 0
    return figures


@pytest.mark.slow
def test_our_step_holds_and_moves_less_than_all_weights() -> None:
    """Neither the device nor the bus sees one copy of the weights in a step."""
    figures = figures_of("ours")
    assert 0 < figures["bus_bytes"] < FULL
    assert 0 < figures["device_bytes"] < FULL


@pytest.mark.slow
def test_fsdp2_moves_its_parameters_twice_and_its_gradients_once() -> None:
    assert figures_of("fsdp2")["bus_bytes"] == 3 * FULL


@pytest.mark.slow
@needs_deepspeed
def test_zero3_moves_its_parameters_twice_and_its_gradients_once() -> None:
    assert figures_of("zero3")["bus_bytes"] == 3 * FULL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "static"])
def test_what_stays_on_the_device_moves_nothing(name: str) -> None:
    assert figures_of(name)["bus_bytes"] == 0


@pytest.mark.slow
@needs_deepspeed
def test_zero2_keeps_its_weights_on_the_device_and_its_momentum_off_it() -> None:
    figures = figures_of("zero2")
    assert figures["bus_bytes"] == 2 * FULL
    assert figures["device_bytes"] >= FULL


def test_a_peer_that_fails_has_its_reason_in_the_table_and_no_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"step_seconds": 2.0, "device_bytes": 4.0, "host_bytes": 8.0, "bus_bytes": 0.0}

    def measured(name: str, config: PeersConfig) -> list[dict[str, float]]:
        if name == "zero3":
            raise RuntimeError("exit codes [1]\nTraceback\nModuleNotFoundError: deepspeed is not installed\n")
        return [known if name == "ours" else {key: 3 * value for key, value in known.items()}]

    monkeypatch.setattr(peers, "measure", measured)
    result = peers.run(TINY)
    rows = {row[0]: row for row in result.table}
    assert list(rows) == list(CONTENDERS)
    assert rows["zero3"][1:] == ["-"] * 4 + ["ModuleNotFoundError: deepspeed is not installed"]
    assert all(len(row) == len(result.header) for row in result.table)
    assert result.ratios["peers.dense.step_vs_ours"] == 3.0
    assert result.ratios["peers.fsdp2.host_vs_ours"] == 3.0
    assert not any("zero3" in key or ".ours." in key for key in result.ratios)


def test_ratios_are_those_of_medians_over_repetitions() -> None:
    def figures(value: float) -> dict[str, float]:
        return dict.fromkeys(FIGURES, value)

    found = {"dense": [figures(6.0), figures(90.0), figures(5.0)], "ours": [figures(2.0)] * 3}
    assert summary(TINY, found, {}).ratios["peers.dense.device_vs_ours"] == 3.0
