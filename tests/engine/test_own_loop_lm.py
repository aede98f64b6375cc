"""The example of a language model in a loop of one's own: it trains, saves, resumes and samples."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "own_loop_lm.py"


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[str, dict]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--batch_size", "2", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


@pytest.mark.timeout(300)
def test_the_example_trains_resumes_and_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--steps", "2", "--out", str(tmp_path))
    printed, first = run(monkeypatch, capsys, *options)
    assert "def " in printed
    assert (tmp_path / "model" / "weights.safetensors").is_file()
    printed, again = run(monkeypatch, capsys, *options)
    assert "resumed at step 2" in printed
    assert again == first, "a run that is over ends the same once more"
    with pytest.raises(SystemExit, match=r"with --rho 0\.5 --seed 0; .* another --out"):
        run(monkeypatch, capsys, *options, "--rho", "0.25", "--seed", "1")
    _, even = run(monkeypatch, capsys, "--method", "even", "--train_flops", str(first["train_flops"]))
    assert even["train_flops"] <= first["train_flops"]
    assert even["parameters"] == first["parameters"]
