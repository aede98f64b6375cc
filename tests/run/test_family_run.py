"""A run with several budgets leaves a network for each, and resumes in the middle of training them."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.export.network_file import read_structure
from tests.support.image_runs import options

SHARES = ("0.1", "0.3", "0.6")


def family(images: Path, run_dir: Path, *more: str) -> int:
    budgets = ("--policy.search", "none", "--policy.budget", "flops", "--policy.rho", "0.1")
    given = (*budgets, "--policy.budgets", f"[{', '.join(SHARES)}]", "--trackers", "[]")
    return main(options(images, run_dir, *given, *more))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert family(images, folder) == 0
    return folder


def folders(run: Path) -> list[Path]:
    return [*(run / "members" / share for share in SHARES[:-1]), run / "model"]


def test_each_member_meets_its_budget_and_holds_the_one_before(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = [*summary["members"].values(), summary]
    assert list(summary["members"]) == list(SHARES[:-1])
    for share, member in zip(SHARES, found, strict=True):
        assert 0.6 * float(share) < member["flops_ratio"] <= float(share) * 1.02
    structures = [read_structure(folder) for folder in folders(run)]
    for small, large in pairwise(structures):
        for name, group in small.groups.items():
            assert set(group.kept) <= set(large.groups[name].kept)


def test_members_share_their_weights_and_have_norms_of_their_own(run: Path) -> None:
    small, large = (load_pruned(folder).state_dict() for folder in (folders(run)[0], folders(run)[-1]))
    kept, of_large = (read_structure(folder).groups for folder in (folders(run)[0], folders(run)[-1]))
    (first, inside), (_, outside) = next(iter(kept.items())), next(iter(of_large.items()))
    rows = [outside.kept.index(channel) for channel in inside.kept]
    torch.testing.assert_close(small[f"{first}.weight"], large[f"{first}.weight"][rows], rtol=0, atol=0)
    norm = next(name.removesuffix(".running_mean") for name in small if name.endswith("running_mean"))
    second = [name for name in small if name.endswith("running_mean")][1]
    assert norm
    assert not torch.equal(small[second], large[second][: len(small[second])])
    (_, inside), (_, outside) = list(kept.items())[1], list(of_large.items())[1]
    rows = [outside.kept.index(channel) for channel in inside.kept]
    for leaf in ("weight", "bias"):
        name = second.replace("running_mean", leaf)
        assert not torch.allclose(small[name], large[name][rows], atol=1e-4), name
    assert small.keys() == large.keys()


def test_a_member_is_evaluated_and_exported_like_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run / "members" / "0.1"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["members"]["0.1"]["test_accuracy"]
    for share, folder in zip(SHARES, folders(run), strict=True):
        assert_exports(run, share, folder, tmp_path / share)


def test_a_member_is_exported_from_the_model_and_from_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = max((run / "checkpoints").glob("step_*"))
    for path, shares in ((run / "model", SHARES), (last, SHARES[1:])):
        for share in shares:
            folder = folders(run)[SHARES.index(share)]
            assert_exports(path, share, folder, tmp_path / path.name / share)
    for path in (run, run / "model"):
        assert main(["export", str(path), "--budget", "0.2"]) == 2
        assert "has no member 0.2; those of the run: 0.1, 0.3, 0.6" in capsys.readouterr().err


def assert_exports(path: Path, share: str, expected: Path, output: Path) -> None:
    assert main(["export", str(path), "--budget", share, "--output", str(output)]) == 0
    ours, copied = (load_pruned(folder).state_dict() for folder in (expected, output))
    assert ours.keys() == copied.keys()
    assert all(torch.equal(ours[name], copied[name]) for name in ours)


def test_a_family_resumes_bit_for_bit(images: Path, run: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert family(images, first, "--checkpoint.every", "3", "--checkpoint.keep", "9") == 0
    for other in sorted(first.glob("checkpoints/step_*"))[1:]:  # as if it had died behind the first one
        shutil.rmtree(other)
    resumed = tmp_path / "resumed"
    [checkpoint] = first.glob("checkpoints/step_*")
    assert family(images, resumed, "--resume", str(checkpoint)) == 0
    for ours, other in zip(folders(run), folders(resumed), strict=True):
        mine, theirs = load_pruned(ours).state_dict(), load_pruned(other).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_family_needs_one_mask_at_a_time(images: Path, tmp_path: Path) -> None:
    assert family(images, tmp_path / "run", "--policy.search", "sampled") == 2
    assert family(images, tmp_path / "run", "--policy.budgets", "[0.1, 0.1]") == 2
