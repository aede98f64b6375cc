"""What a run has left in its folder, to be compared with what another one has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; of a step that was made twice, the last."""
    entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def digest(run_dir: Path) -> str:
    """Of all weights, slots and statistics that a finished run has left in its store."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted((run_dir / "store").glob("rank*/*.bin")):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()
