"""The bench of the LeNets: finished runs are not run again, and the keys are those of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offload_sparse.bench import cells, dfbst
from offload_sparse.bench.options import DFBSTBenchConfig


def test_every_method_has_its_figures_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: cells.Run) -> subprocess.Popen[bytes]:
        options = run.options
        method, seed = options["method"], options["train.seed"]
        run.folder.mkdir()
        step = 0.01 if method == "dense" else 0.02
        summary = {"test_accuracy": 0.9 + seed / 100, "seconds": 1.0, "step_seconds_median": step}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        (run.folder / "config.yaml").write_text("data: {name: fashion_mnist_small}")
        left = {} if method == "dense" else {"forward_remaining": 0.1 + seed / 10, "backward_remaining": 0.5}
        (run.folder / "metrics.jsonl").write_text("{}\n" + json.dumps(left) + "\n")
        started.append(run.folder.name)
        return subprocess.Popen([sys.executable, "-c", ""])

    started: list[str] = []
    monkeypatch.setattr(cells.Run, "start", train)
    config = DFBSTBenchConfig(seeds=2, cache=str(tmp_path))
    result = dfbst.run(config)
    assert len(started) == len(set(started)) == 12
    for model in ("lenet300", "lenet5"):
        for method in ("dense", "dst", "dfbst"):
            key = f"dfbst.{model}.{method}"
            assert result.ratios[f"{key}.accuracy"] == pytest.approx(90.5)
            assert result.ratios[f"{key}.remaining"] == pytest.approx(1.0 if method == "dense" else 0.15)
            assert result.ratios[f"{key}.step_vs_dense"] == (1.0 if method == "dense" else 2.0)
    again = dfbst.run(config)
    assert again.ratios == result.ratios
    assert len(started) == 12


@pytest.mark.slow
def test_a_short_run_of_each_method_has_all_figures(tmp_path: Path) -> None:
    result = dfbst.run(DFBSTBenchConfig(quick=True, cache=str(tmp_path)))
    for key, value in result.ratios.items():
        assert key.endswith((".spread", ".step_vs_dense")) or 0 < value <= 100, key
    assert result.ratios["dfbst.lenet300.dfbst.remaining"] < 1
