"""A run that is interrupted and carried on is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.config.run import RunConfig
from offload_sparse.export.json_values import sealed
from offload_sparse.run.checkpoint_files import CheckpointFolder
from offload_sparse.run.resume import differences, run_values
from offload_sparse.run.trainer import Run
from offload_sparse.workloads.config import DataConfig
from tests.support.image_runs import contents, interrupted, poison, train, with_classes

METHODS = ["sparse_offload", "dense", "static", "dfbst", "rigl", "grow_efficient"]


@pytest.fixture(scope="module")
def _dense(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("dense") / "run"
    assert interrupted(2, images, run, "--method", "dense") == 0
    return run


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, which no test changes."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(images, run) == 0
    return run


@pytest.fixture
def stopped(_dense: Path, tmp_path: Path) -> Path:
    """A run of ``dense`` that was interrupted in its third step; a test has its own copy."""
    return Path(shutil.copytree(_dense, tmp_path / "stopped"))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # A checkpoint brings the store up to date, and a resumed run fetches everything: the bus notices.
    measured = ("time", "round_timeline", "_bytes", "_bytes_per_round", "_seconds")
    return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    networks = [load_pruned(folder / "model").state_dict() for folder in (a, b)]
    assert networks[0].keys() == networks[1].keys()
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for key in ("test_accuracy", "test_loss", "params_ratio", "flops_ratio", "train_cost_saving", "steps"):
        assert summaries[0][key] == summaries[1][key], key


# A subnet, the plain network, and two kinds of weight masks.
QUICK = ("sparse_offload", "dense", "dfbst", "rigl")


@pytest.mark.parametrize(
    ("step", "method"),
    [
        pytest.param(step, method, marks=() if step == 4 and method in QUICK else pytest.mark.slow)
        for step in (0, 4, 8)
        for method in METHODS
    ],
)
def test_straight_is_interrupted_and_resumed(method: str, step: int, images: Path, tmp_path: Path) -> None:
    """SIGTERM inside the first round, between two lines of metrics, in the fine-tune; SGD and AdamW."""
    optimizer = "adamw" if step == 4 else "sgd"
    more = ["--method", method, "--optim.name", optimizer, "--optim.lr", "0.01", "--round.freeze_at", "0.6"]
    assert train(images, tmp_path / "straight", *more) == 0
    assert interrupted(step, images, tmp_path / "parts", *more) == 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert train(images, tmp_path / "parts", *more) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_many_parts_and_background_checkpoints_make_the_same_run(
    images: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--checkpoint.every", "1", "--checkpoint.keep", "1"]
    for step in (1, 5, 9):
        assert interrupted(step, images, tmp_path / "parts", *more, number=signal.SIGINT) == 0
        said = f"stopped at step {step + 1} (SIGINT); the same command resumes"
        assert said in capsys.readouterr().err
    assert train(images, tmp_path / "parts", *more) == 0
    assert_same_run(straight, tmp_path / "parts")
    assert len(CheckpointFolder(tmp_path / "parts" / "checkpoints").checkpoints()) in (1, 2), (
        "newest and best"
    )


def test_what_a_plan_is_told_of_the_images_may_change() -> None:
    """Checkpoints of earlier versions have it among the settings that may not."""
    told = {"data.declared": {"num_classes": 2}}
    assert not differences(run_values(RunConfig()), run_values(RunConfig()) | told)
    assert run_values(RunConfig(data=DataConfig(declared={"num_classes": 2}))) == run_values(RunConfig())


def test_a_run_that_died_resumes_from_its_last_checkpoint(
    images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of metrics after that checkpoint are written again."""
    original = Run.train_step

    def dies(self: Run, at: int, batch: Any) -> None:
        if at == 9:
            raise KeyboardInterrupt
        original(self, at, batch)

    more = ["--checkpoint.every", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", dies)
        assert train(images, tmp_path / "parts", *more) == 130
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # half a line
    assert train(images, tmp_path / "parts") == 0
    assert_same_run(straight, tmp_path / "parts")


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Run, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "epoch_metrics", dies)
        assert train(images, tmp_path / "parts") == 130
    assert metrics(tmp_path / "parts")
    assert train(images, tmp_path / "parts") == 0
    assert_same_run(straight, tmp_path / "parts")


def test_a_finished_run_says_so_and_changes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(images, tmp_path, "--method", "dense") == 0
    before = (tmp_path / "summary.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert train(images, tmp_path, "--method", "dense") == 0
    assert "finished; --overwrite true trains it anew" in " ".join(capsys.readouterr().out.split())
    assert ((tmp_path / "summary.json").read_text(), (tmp_path / "metrics.jsonl").read_text()) == before
    assert train(images, tmp_path, "--method", "dense", "--overwrite", "true") == 0
    assert (tmp_path / "summary.json").read_text() != before[0], "it took another time"


@pytest.mark.parametrize("method", ["sparse_offload", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_finished_run_grows(
    method: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a schedule that does not depend on the end, it is the run that was as long from the start."""
    more = ["--method", method, "--optim.schedule", "constant", "--round.freeze_at", "0"]
    assert train(images, tmp_path / "straight", *more) == 0
    assert train(images, tmp_path / "parts", *more, "--train.epochs", "1") == 0
    capsys.readouterr()
    assert train(images, tmp_path / "parts", *more, "--quiet", "false") == 0
    error = capsys.readouterr().err
    assert "resuming at step 6" in error
    assert "the run grows from 6 to 12 steps, as does its schedule" in error
    one, other = (load_pruned(tmp_path / name / "model").state_dict() for name in ("straight", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(images, tmp_path / "parts", *more, "--train.epochs", "1") == 2
    assert "train.epochs 2 instead of 1" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True], ids=["here", "on another disk"])
def test_a_run_goes_back_to_one_of_its_checkpoints(linked: bool, images: Path, tmp_path: Path) -> None:
    """Those that came after it go, so that its own are not the oldest; the same command does not go back
    again.
    """
    run, more = tmp_path / "run", ["--method", "dense", "--checkpoint.every", "2"]
    assert train(images, run, *more) == 0
    weights = (run / "model" / "weights.safetensors").read_bytes()
    if linked:
        (run / "checkpoints").rename(tmp_path / "disk")
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    older = run / "checkpoints" / CheckpointFolder(run / "checkpoints").checkpoints()[-1].name
    back = [*more, "--resume", str(older)]
    assert train(images, run, *back) == 0
    assert (run / "model" / "weights.safetensors").read_bytes() == weights
    before = (run / "summary.json").read_text()
    assert train(images, run, *back) == 0
    assert (run / "summary.json").read_text() == before, "it is finished"


def test_the_run_that_another_was_begun_from_is_known_in_every_folder(
    images: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert interrupted(4, images, Path("second"), "--method", "dense", "--resume", stopped.name) == 0
    monkeypatch.chdir("elsewhere")
    assert train(images, Path("../second"), "--method", "dense", "--resume", f"../{stopped.name}") == 0


def test_a_run_that_replaces_another_starts_from_the_checkpoint_named(
    images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And from none of the run that it replaces, nor from one that it would remove."""
    shutil.copytree(stopped, tmp_path / "other")
    more = ["--method", "dense", "--overwrite", "true"]
    assert train(images, tmp_path / "other", *more, "--resume", str(stopped / "checkpoints")) == 0
    assert f"resuming at step 3 from {stopped}" in " ".join(capsys.readouterr().err.split())
    before = contents(stopped)
    assert train(images, stopped, *more, "--resume", str(stopped / "checkpoints")) == 2
    assert "overwrite true would remove what resume" in capsys.readouterr().err
    assert contents(stopped) == before


def test_a_store_in_files_knows_its_checkpoint_by_every_path(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert interrupted(2, images, Path("run"), "--store.tier", "file") == 0
    newest = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert train(images, Path("run"), "--store.tier", "file", "--resume", str(newest)) == 0


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (["--optim.lr", "0.01"], "with optim.lr 0.1 instead of 0.01; give another folder"),
        (["--model.arguments.width", "0.5"], "model.arguments"),
        (["--resume", "never"], "holds a run already"),
        (["--resume", "no/such/folder"], "does not exist"),
        (["--resume", "no/such/folder", "--overwrite", "true"], "does not exist"),
    ],
)
def test_a_run_that_cannot_be_carried_on_is_refused_and_left_alone(
    more: list[str], advice: str, images: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(stopped)
    assert train(images, stopped, "--method", "dense", *more) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert advice in message
    assert contents(stopped) == before


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_attempt_resumes_the_run_that_resume_never_has_begun(
    count: str,
    images: Path,
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And no other one, which the attempt before has refused. Slurm counts how often a job was requeued."""
    more = ("--method", "dense", "--resume", "never")
    assert interrupted(2, images, tmp_path / "own", *more) == 0
    assert "the same command without --resume never resumes" in capsys.readouterr().err
    monkeypatch.setenv(count, "1")
    assert train(images, tmp_path / "own", *more) == 0
    assert "resuming at step 3" in capsys.readouterr().err
    assert train(images, stopped, *more) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_requeued_job_resumes_the_run_that_overwrite_has_begun(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand the same command begins anew, which the first part says; or is refused, as for another run."""
    more = ("--method", "dense", "--overwrite", "true", "--resume", "never")
    assert interrupted(2, images, tmp_path, *more) == 0
    without = "the same command without --overwrite true (which starts anew) and --resume never resumes"
    assert without in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(images, tmp_path, *more) == 0
    assert "resuming at step 3" in capsys.readouterr().err


@pytest.mark.parametrize("tier", ["ram", "file"])
def test_a_run_whose_classes_are_others_is_refused_and_left_alone(
    tier: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names have changed in the same files. With the old ones it resumes to the end that it would have
    had, also where a store in files has been opened in between."""
    data, run = Path(shutil.copytree(images, tmp_path / "data")), tmp_path / "run"
    more = ("--store.tier", tier)
    assert interrupted(2, data, run, *more) == 0
    with_classes(images, data, "light", "dusk")
    before = {p: text for p, text in contents(run).items() if "store" not in p.parts}
    capsys.readouterr()
    assert train(data, run, *more) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "was trained on 96 train, 40 test images of 2 classes: dark, light (" in message
    assert "has 96 train, 40 test images of 2 classes: light, dusk (" in message
    assert {p: p.read_bytes() for p in before} == before
    if tier == "file":
        shutil.copytree(images, data, dirs_exist_ok=True)
        assert train(data, run, *more) == 0
        assert train(data, tmp_path / "straight", *more) == 0
        assert_same_run(tmp_path / "straight", run)


def test_a_run_whose_images_have_moved_resumes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its checkpoint is evaluated, with the new place. A finished run is not taken for one on others."""
    parts, more = tmp_path / "parts", ("--method", "dense")
    assert train(images, tmp_path / "straight", *more) == 0
    data = Path(shutil.copytree(images, tmp_path / "data"))
    assert interrupted(4, data, parts, *more) == 0
    there = data.rename(tmp_path / "there")
    newest = parts / "checkpoints" / "step_00000005"
    assert main(["evaluate", str(newest)]) == 2
    assert main(["evaluate", str(newest), "--data.name", str(there)]) == 0
    capsys.readouterr()
    assert train(there, parts, *more) == 0
    assert "the classes and all labels are the same" in " ".join(capsys.readouterr().err.split())
    assert_same_run(tmp_path / "straight", parts)
    assert train(images, parts, *more) == 2
    assert "holds a run already, with data.name" in capsys.readouterr().err


def test_of_an_earlier_version_only_the_place_of_the_images_is_known(
    images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "checkpoints" / "step_00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"], manifest["run"]["images"]
    path.write_text(sealed(manifest))
    there = Path(shutil.copytree(images, tmp_path / "there"))
    assert train(there, stopped, "--method", "dense") == 2
    assert f"it is of a run with data.name {images}" in capsys.readouterr().err
    assert train(images, stopped, "--method", "dense") == 0
    assert "resuming at step 3" in capsys.readouterr().err


def test_a_start_from_another_run_names_the_setting_that_differs(
    images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "dense", "--optim.lr", "0.01", "--resume", str(stopped))
    assert train(images, tmp_path / "second", *more) == 2
    advice = "give the settings that it was made with, or leave out resume\n"
    assert f"with optim.lr 0.1 instead of 0.01); {advice}" in capsys.readouterr().err


def test_a_run_whose_store_is_elsewhere_is_refused_and_left_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is not mounted; so is one of its checkpoints."""
    run, more = tmp_path / "run", ("--store.tier", "file", "--store.path", "store")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert interrupted(2, images, run, *more) == 0
    before = contents(tmp_path)
    monkeypatch.chdir("elsewhere")
    checkpoint = run / "checkpoints" / "step_00000003"
    for again in (partial(train, images, run, *more), partial(main, ["evaluate", str(checkpoint)])):
        capsys.readouterr()
        assert again() == 2
        assert "there is no store in store/rank0" in capsys.readouterr().err
        assert contents(tmp_path) == before
    monkeypatch.chdir("..")
    assert train(images, run, *more) == 0
    assert "resuming at step 3 from its own store" in capsys.readouterr().err


def test_checkpoints_that_are_all_damaged_are_an_error_and_stay(
    images: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = CheckpointFolder(stopped / "checkpoints").checkpoints()
    (folder / "rank_0.safetensors").write_bytes(b"damaged")
    before = contents(stopped)
    assert train(images, stopped, "--method", "dense") == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert contents(stopped) == before


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_can_be_the_start(
    images: Path, straight: Path, tmp_path: Path
) -> None:
    assert interrupted(4, images, tmp_path / "first") == 0
    assert train(images, tmp_path / "second", "--resume", str(tmp_path / "first")) == 0
    assert metrics(tmp_path / "second") == [line for line in metrics(straight) if line["step"] > 5]
    one, other = (load_pruned(run / "model").state_dict() for run in (straight, tmp_path / "second"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- losses that are not finite ----------------------------------------------------------------------


def test_stop_names_the_step_and_the_rank(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 5)
    assert train(images, tmp_path, "--method", "dense", "--checkpoint.every", "1") == 1
    assert "step 5 is not finite on rank 0" in capsys.readouterr().err
    newest = CheckpointFolder(tmp_path / "checkpoints").checkpoints()[0]
    assert newest.name == "step_00000005", "what is not finite is never saved"


def assert_finite(run_dir: Path) -> None:
    """No line of the log and no weight has what was poisoned in it."""
    assert all(line["loss"] is not None for line in metrics(run_dir) if "loss" in line)
    network = load_pruned(run_dir / "model").state_dict()
    assert all(bool(value.isfinite().all()) for value in network.values())


@pytest.mark.parametrize("method", ["dense", "sparse_offload"])
def test_skip_leaves_out_the_step_and_its_statistics(
    method: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 5, 6)
    assert train(images, tmp_path, "--method", method, "--train.on_nonfinite", "skip") == 0
    assert metrics(tmp_path)[-1]["step"] == 12
    logged = [line for line in metrics(tmp_path) if "loss" in line]
    assert method != "dense" or logged[-1]["skipped_steps"] == 2
    assert_finite(tmp_path)


@pytest.mark.parametrize("method", ["dense", "sparse_offload"])
def test_skip_gives_up_when_no_step_is_finite_any_more(
    method: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, *range(1000))
    more = ["--train.on_nonfinite", "skip", "--train.log_every", "5"]
    assert train(images, tmp_path, "--method", method, *more) == 1
    assert "too many steps are not finite (10 in a row, 10 of 10 steps)" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("method", ["dense", "sparse_offload"])
def test_a_rollback_leaves_out_the_batches_that_led_to_it(
    method: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes back to the last checkpoint and does not train on the batches between that and the loss."""
    seen = poison(monkeypatch, 5 if method == "dense" else 10)
    more = ["--train.on_nonfinite", "rollback", "--checkpoint.every", "4"]
    assert train(images, tmp_path, "--method", method, *more) == 0
    assert sorted({line["step"] for line in metrics(tmp_path) if "loss" in line}) == [4, 8, 12]
    assert_finite(tmp_path)
    if method == "dense":
        again = poison(monkeypatch)  # without faults, to see the order of the data
        assert train(images, tmp_path / "plain", "--method", method) == 0
        assert not torch.equal(seen[8], again[4]), "the batches of steps 4 to 7 are left out"
        assert torch.equal(seen[8], again[8])


def test_a_store_in_files_does_not_go_back_to_a_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends, and the same command resumes where its store is."""
    more = ["--store.tier", "file", "--train.on_nonfinite", "rollback", "--checkpoint.every", "2"]
    more += ["--train.max_steps", "24", "--round.k", "2", "--round.freeze_at", "0.9"]
    with monkeypatch.context() as patch:
        poison(patch, *range(12, 1000))
        assert train(images, tmp_path, *more) == 1
    assert "(a store in files does not go back)" in capsys.readouterr().err
    assert train(images, tmp_path, *more) == 0
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line][-1] == 24


def test_rollback_without_a_checkpoint_stops(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 2)
    assert train(images, tmp_path, "--method", "dense", "--train.on_nonfinite", "rollback") == 1
    assert "no checkpoint to go back to" in capsys.readouterr().err
