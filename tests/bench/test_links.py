"""Slow links: what is printed of what two ranks have measured; and nothing where there are no namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offload_sparse.bench import links, sync
from offload_sparse.bench.cells import Run
from offload_sparse.bench.links import MODES
from offload_sparse.bench.options import LinksConfig, SyncBenchConfig


def test_without_namespaces_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: str) -> None:
        raise PermissionError("network namespaces need root")

    monkeypatch.setattr(links, "_call", refused)
    result = links.run(LinksConfig(quick=True))
    assert result.ratios == {}
    assert len(result.table) == 1
    assert "skipped: network namespaces need root" in result.table[0][0]


def test_speeds_are_relative_to_the_same_mode_without_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what has been measured with a cache is not measured again."""

    @contextmanager
    def linked() -> Iterator[tuple[str, str]]:
        yield "a", "b"

    def measured(_: tuple[str, str], settings: dict[str, Any]) -> dict[str, dict[str, float]]:
        speed = {"unlimited": 10.0, "1gbit": 9.0, "100mbit": 5.0}
        sent = {"dense": 400.0, "step": 100.0, "round": 4.0}
        model, mode = settings["model"], settings["mode"]
        cells.append(f"{model}.{mode}")
        return {
            f"{model}.{mode}.{rate}": {"steps_per_second": speed[rate], "bytes_per_step": sent[mode]}
            for rate in settings["rates"]
        }

    cells: list[str] = []
    monkeypatch.setattr(links, "_linked", linked)
    monkeypatch.setattr(links, "_on_both", measured)
    cached = LinksConfig(cache=str(tmp_path / "cells"))
    first = links.run(cached)
    result = links.run(cached)
    assert result.ratios == first.ratios
    assert cells == [f"{model}.{mode}" for model in links.MODELS for mode in MODES]
    assert result.ratios["links.resnet50.100mbit.round"] == 0.5
    assert result.ratios["links.vgg19.1gbit.dense"] == 0.9
    assert result.ratios["links.vgg19.wire.round_vs_step"] == 0.04
    assert set(links.run(LinksConfig(quick=True)).ratios) == {
        *(f"links.vgg19.100mbit.{mode}" for mode in MODES),
        "links.vgg19.wire.round_vs_step",
    }


def test_a_difference_is_over_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(run: Run) -> tuple[dict[str, float], list[Any]]:
        assert run.ranks == 2
        options = run.options
        once = options.get("round.sync") == "round"
        return {"test_accuracy": 0.5 + 0.1 * options["train.seed"] - 0.02 * once}, []

    monkeypatch.setattr(sync, "finish", lambda runs, jobs: None)
    monkeypatch.setattr(sync, "outcome", trained)
    result = sync.run(SyncBenchConfig(modes=["step", "round50"]))
    assert result.ratios["sync.round50.vs_step"] == pytest.approx(-2)
    assert result.ratios["sync.round50.vs_step_spread"] == pytest.approx(0)
    assert result.ratios["sync.step.accuracy"] == pytest.approx(55)
