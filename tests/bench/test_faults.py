"""The record of a sweep: how many points of each kind, how many survived, and what was lost, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from offload_sparse.bench import contract
from offload_sparse.bench.faults import KINDS, Point, Swept, _result


def test_the_record_counts_points_by_kind_and_names_what_was_lost(tmp_path: Path) -> None:
    swept = Swept("start")
    for kind in (*KINDS, "twice", "twice"):
        swept.count(kind, "", Point("open it", kind, "digest"))
    swept.count("kill", "another loss", Point("rename it/model", "kill", "digest"))
    contract.write(_result([swept]), "bench faults", tmp_path / "faults.json")
    record = json.loads((tmp_path / "faults.json").read_text())
    assert record["ratios"]["faults.points"] == 4
    assert record["ratios"]["faults.survived"] == 0.75
    assert record["ratios"]["faults.power_loss"] == 1
    (way,) = record["raw"]
    assert way["points"] == dict.fromkeys(KINDS, 1) | {"twice": 2, "kill": 2}
    assert way["survived"] == dict.fromkeys(KINDS, 1) | {"twice": 2}
    assert way["lost"] == ["kill: rename it/model: another loss"]
