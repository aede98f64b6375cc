"""The configuration reference in the repository is that of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sparse.cli.main import main
from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig

FILE = Path(__file__).parents[2] / "configs" / "REFERENCE.md"


def test_the_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == FILE.read_text(encoding="utf-8"), (
        "write it anew: offload-sparse config --markdown > configs/REFERENCE.md"
    )


def test_every_option_is_in_the_reference_with_its_default() -> None:
    text = FILE.read_text(encoding="utf-8")
    for name in arguments.flat_tree(RunConfig()):
        assert f"| `{name}` |" in text
    assert "| `policy.rho` | `NUMBER` | `0.25` |" in text


def test_config_prints_what_files_and_options_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("policy: {rho: 0.5}\n")
    assert main(["config", "--config", str(tmp_path / "c.yaml"), "--round.k", "7"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    found = arguments.parse(["--config", str(tmp_path / "resolved.yaml")])
    assert found == arguments.parse(["--policy.rho", "0.5", "--round.k", "7"])
