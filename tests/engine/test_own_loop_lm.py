"""The example of a language model in a loop of one's own: it trains, saves, resumes and samples."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "own_loop_lm.py"

Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What the example prints with some options, and its result; of a small network on short texts."""
    spec = importlib.util.spec_from_file_location("own_loop_lm", SCRIPT)
    assert spec
    assert spec.loader
    example = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:  # dataclasses look for their module
        patch.setitem(sys.modules, spec.name, example)
        spec.loader.exec_module(example)
    monkeypatch.setattr(example, "CONTEXT", 16)
    monkeypatch.setattr(example.CharacterModel.__init__, "__defaults__", (32, 8, 2))

    def result(*options: str) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--batch_size", "2", *options])
        example.main()
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    return result


def test_the_example_trains_resumes_and_samples(run: Run, tmp_path: Path) -> None:
    options = ("--steps", "2", "--out", str(tmp_path))
    printed, first = run(*options)
    assert "def " in printed
    assert (tmp_path / "model" / "weights.safetensors").is_file()
    printed, again = run(*options)
    assert "resumed at step 2" in printed
    assert again == first, "a run that is over ends the same once more"
    sys.argv += ["--rho", "0.25", "--seed", "1"]
    with pytest.raises(SystemExit, match=r"with --rho 0\.5 --seed 0; .* another --out"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    _, even = run("--method", "even", "--train_flops", str(first["train_flops"]))
    assert even["train_flops"] <= first["train_flops"]
    assert even["parameters"] == first["parameters"]
