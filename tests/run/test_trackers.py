"""Trackers by name: TensorBoard unless told otherwise, and a line of advice for one that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import tracking

from offload_sparse.cli.main import main
from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.run.launch import check_trackers

SMALL = [
    *("train", "--data.limit", "64", "--data.batch_size", "16"),
    *("--model.arguments.width", "0.25", "--round.k", "2", "--train.epochs", "1", "--train.check", "false"),
    *("--quiet", "true"),
]


def test_a_run_is_in_tensorboard_with_every_number_of_its_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*SMALL, "--train.log_every", "2", "--run_dir", str(tmp_path)]) == 0
    (events,) = (tmp_path / "trackers" / "offload_sparse").glob("events.*")
    found = EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [2, 4]
    assert {"accuracy", "lr", "entropy", "expected_size", "flops_ratio"} <= set(found.Tags()["scalars"])


def test_overwriting_a_run_removes_what_its_trackers_wrote(tmp_path: Path) -> None:
    for overwrite in ("false", "true"):
        assert main([*SMALL, "--run_dir", str(tmp_path), "--overwrite", overwrite]) == 0
    assert len(list((tmp_path / "trackers" / "offload_sparse").glob("events.*"))) == 1


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    assert main([*SMALL, "--trackers", "[]", "--run_dir", str(tmp_path)]) == 0
    assert not (tmp_path / "trackers").exists()


def test_trackers_are_given_by_commas_or_as_a_list() -> None:
    assert RunConfig().trackers == ["tensorboard"]
    for text in ("tensorboard,wandb", "tensorboard, wandb", "[tensorboard, wandb]"):
        assert arguments.parse(["--trackers", text]).trackers == ["tensorboard", "wandb"]


@pytest.mark.parametrize("name", sorted(tracking.LOGGER_TYPE_TO_CLASS))
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(
        ValueError, match=f"names {name}, which is not installed; run: pip install '?{name[:3]}"
    ):
        check_trackers([name])


def test_an_unknown_tracker_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--trackers", "tensorbord", "--run_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'tensorbord', which accelerate does not know; give some of aim, clearml" in error
    assert not (tmp_path / "run").exists()
