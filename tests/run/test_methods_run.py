"""Every method from the command line: train, evaluate what was exported, and the figures that are left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sparse.cli.main import main
from offload_sparse.methods.weight_masks import rigl

METHODS = ("dst", "dfbst", "rigl", "grow_efficient")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few steps RigL replaces weights, too."""
    monkeypatch.setattr(rigl, "INTERVAL", 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_logged_summed_up_exported_and_evaluated(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        *("train", "--method", method, "--run_dir", str(tmp_path)),
        *("--data.limit", "256", "--data.batch_size", "32"),
        *("--model.name", "offload_sparse/vgg_small", "--model.arguments.width", "0.1"),
        *("--train.epochs", "2", "--quiet", "true", "--dst.alpha", "0.05"),
    )
    assert main(options) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["params_ratio"] < 1
    assert 0 < summary["forward_remaining"] < 1
    assert "takes as long as a dense one" in summary["note"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "flops_ratio" in line]
    assert len(epochs) == 2
    assert epochs[-1]["forward_remaining.classifier"] == summary["layers"]["classifier"]["forward_remaining"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["test_accuracy"]
