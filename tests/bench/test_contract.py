"""``offload-sparse bench``: what it lists, prints and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sparse.bench import contract
from offload_sparse.bench.contract import BenchResult
from offload_sparse.cli import main as cli


def test_bench_lists_what_it_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith(" ")]  # others go on with a sentence
    assert listed == list(contract.available())
    assert "contract" not in listed


def test_a_bench_is_a_module_with_a_run_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contract.py").write_text("")
    (tmp_path / "widths.py").write_text('"""How widths matter.\n\nMore."""\ndef run(quick): ...\n')
    (tmp_path / "helper.py").write_text("def other(): ...\n")
    monkeypatch.setattr(contract, "__file__", str(tmp_path / "contract.py"))
    assert contract.available() == {"widths": "How widths matter."}


def test_bench_prints_its_table_and_keeps_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(quick: bool) -> BenchResult:
        ratios = {"speed": 2.0 if quick else 4.0}
        return BenchResult(ratios, {"seconds": [1, 2]}, ["case", "seconds"], [["a", 1.5]])

    monkeypatch.setattr(contract, "load", {"widths": run}.__getitem__)
    file = tmp_path / "new" / "widths.json"
    assert cli.main(["bench", "--quick", "widths", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "1.5" in output
    assert "speed: 2" in output
    record = json.loads(file.read_text())
    assert set(record) == {"command", "hardware", "versions", "ratios", "raw"}
    assert record["command"] == f"offload-sparse bench --quick widths --json {file}"
    assert record["ratios"] == {"speed": 2.0}
    assert record["raw"] == {"seconds": [1, 2]}
    assert {"python", "torch"} <= set(record["versions"])
    assert record["hardware"]["cores"] >= 1


def test_a_record_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .* with --json"):
        contract.write(BenchResult({}, {}), "command", tmp_path / "file" / "x.json")
