"""The program ``offload-sparse``: commands, exit codes, help."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_sparse.channels import check as verify_module
from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.cli import main as cli
from offload_sparse.config.run import RunConfig
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.inspect import coverage
from offload_sparse.run.log import Recorder
from offload_sparse.workloads.models import build_model

ROOT = Path(__file__).parents[2]
SMALL = "offload_sparse/vgg_small"
CASES = (coverage.Case(SMALL, 28), coverage.Case("torchvision/alexnet", 16))


def start(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("offload-sparse: error: ")
    assert output.err.count("\n") == 1
    return output.err


# --- mistakes ----------------------------------------------------------------------------------------


def test_a_mistake_reaches_the_shell_as_one_line_and_exit_code_2() -> None:
    for program in (["-m", "offload_sparse.cli", "train"], [str(ROOT / "launch" / "train.py")]):
        done = start(*program, "--policy.rho", "2")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            "offload-sparse: error: policy.rho is 2.0; give a remaining ratio in (0, 1], such as 0.25\n"
        )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["--policy.rho", "0.1"], "unknown command --policy.rho; give one of train"),
        (["train", "--config", "no.yaml"], "there is no configuration file no.yaml"),
        (["train", "--round.k", "0"], "round.k is 0"),
        (["train", "--foo", "0"], "unknown option --foo"),
        (["verify"], "--model is missing"),
        (["verify", "--all", "--model", SMALL], "--model and --all exclude each other"),
        (["verify", "--model", "offload_sparse/vgg_smal"], "unknown model"),
        (["verify", "--model", SMALL, "--rho", "0"], "rho is 0.0; give a ratio in (0, 1]"),
        (["verify", "--model", SMALL, "--residual", "no"], "give one of coupled, internal"),
        (["verify", "--model", SMALL, "--image_size", "-1"], "image_size is -1"),
        (["evaluate"], "are required: path; try: offload-sparse evaluate runs/quickstart"),
        (["evaluate", "no/such/folder"], "no/such/folder does not exist; give the folder of a run"),
        (["evaluate", "x", "--split", "best"], "give one of test, train, validation"),
        (["bench", "no_such_bench"], "there is no bench 'no_such_bench'; give one of"),
        (["bench", "a", "b"], "there is no bench 'a b'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(argv, capsys)


@pytest.mark.parametrize("path", ["loop", "loop/below", "x" * 300], ids=["loop", "below", "long"])
@pytest.mark.parametrize("before", ["evaluate", "export", "report", "train --config", "train --run_dir"])
def test_a_path_that_can_lead_nowhere_is_bad_input(
    before: str,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A link to itself, and a name that is too long."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert path in error_of([*before.split(), path], capsys)


def test_an_unwritable_run_folder_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = error_of(["train", "--run_dir", str(tmp_path / "file" / "run")], capsys)
    assert "cannot be written (Not a directory); give another folder" in line


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_gone_ends_without_a_word(unbuffered: str) -> None:
    """As behind ``| head``, whether its lines are printed one by one or at its end."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "offload_sparse.cli", "bench"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_needs_no_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """``>&-`` leaves none."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 0


# --- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: offload-sparse {command}" in text
    assert f"examples:\n  offload-sparse {command}" in text
    assert "default: " in text


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_help_and_mistakes_do_not_import_torch() -> None:
    script = """
import sys
from offload_sparse.cli.main import COMMANDS, main
helps = [[name, "--help"] for name in COMMANDS]
for argv in ([], ["--version"], ["nothing"], ["bench"], *helps, ["train", "--foo"]):
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# --- verify ------------------------------------------------------------------------------------------

VERIFY_KEYS = {
    "model",
    "rho",
    "residual",
    "atoms",
    "groups",
    "kept",
    "output_error",
    "gradient_error",
    "discover_seconds",
    "verify_seconds",
    "ok",
}


@pytest.mark.parametrize("residual", ["internal", "filter"])
def test_verify_measures_errors_of_outputs_and_gradients(
    residual: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["verify", "--model", "offload_sparse/resnet20_cifar", "--rho", "0.5", "--json"]
    assert cli.main([*argv, "--residual", residual]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) >= VERIFY_KEYS
    assert figures["ok"] is True
    assert 0 < figures["kept"] < figures["atoms"]
    assert max(figures["output_error"], figures["gradient_error"]) <= 1e-8


def test_verify_prints_a_table_and_fails_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_module, "TOLERANCE", 0.0)
    assert cli.main(["verify", "--model", SMALL]) == 1
    assert "gradient error" in capsys.readouterr().out


@pytest.fixture(scope="module")
def covered() -> Any:
    """What `verify --all` prints of a network and of one that is refused."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(coverage, "CASES", CASES)
        assert cli.main(["verify", "--all", "--json"]) == 1
    return json.loads(printed.getvalue())


def test_verify_all_lists_every_network_and_why_it_is_refused(covered: Any) -> None:
    found = covered
    assert (found["accepted"], found["refused"], found["ok"]) == (1, 1, False)
    *good_rows, bad = (r for r in found["models"] if r["model"] == SMALL or r["residual"] == "coupled")
    good = good_rows[0]
    assert {row["residual"] for row in good_rows if row["accepted"]} == {"coupled", "internal", "filter"}
    assert found["worst_export_difference"] < 1e-5
    assert found["other_in_training"] == 0
    assert set(good) == set(bad) >= {"model", "atoms", "groups", "discover_seconds", "reason"}
    assert max(good["output_error"], good["gradient_error"]) < 1e-8
    assert "cannot be traced" in bad["reason"]


@pytest.mark.parametrize("cases", [CASES[:1], CASES], ids=["accepted", "refused"])
def test_verify_all_fails_where_a_network_is_refused(
    cases: Any, covered: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(case: coverage.Case, **_: object) -> list[Any]:
        return [row for row in covered["models"] if row["model"] == case.name]

    monkeypatch.setattr(coverage, "CASES", cases)
    monkeypatch.setattr(coverage, "examine", examine)
    refused = len(cases) > 1
    assert cli.main(["verify", "--all"]) == refused
    assert ("refused: AlexNet cannot be traced" in capsys.readouterr().out) == refused


# --- evaluate ----------------------------------------------------------------------------------------


def exported_run(run_dir: Path, name: str = SMALL, **preprocessing: Any) -> nn.Module:
    """A run folder whose network is a random one that keeps all its channels."""
    arguments = {"num_classes": 10, "in_channels": 1, "image_size": 28}
    network = build_model(name, **arguments).eval()
    config = RunConfig(run_dir=run_dir)
    config.data.limit, config.data.image_size = 64, 28
    run_dir.mkdir(exist_ok=True)
    with Recorder(config) as recorder:
        recorder.begin(1, 1)
    channel_map = ChannelMap((Group("all", 0, 1),), {}, {})
    model = {"name": name, "arguments": arguments}
    final = FinalNetwork(network, torch.ones(1, dtype=torch.bool), channel_map)
    final.save(run_dir / "model", model, {"mean": [0.25], "std": [0.5]} | preprocessing)
    return network


def test_evaluate_measures_the_exported_network_on_the_data_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from offload_sparse.workloads.data.loader import EvalLoader
    from offload_sparse.workloads.data.source import load_splits

    network = exported_run(tmp_path)
    config = RunConfig().data
    config.limit = 64
    (batch,) = EvalLoader(load_splits(config).test, config)
    with torch.no_grad():
        logits = network((batch.images / 255 - 0.25) / 0.5)
    expected_loss = float(nn.functional.cross_entropy(logits, batch.labels))
    expected_accuracy = float((logits.argmax(1) == batch.labels).double().mean())
    (tmp_path / "model" / "config.yaml").write_text("compute_environment: LOCAL_MACHINE")  # is no run's
    for path in (tmp_path, tmp_path / "model"):
        assert cli.main(["evaluate", "--json", str(path)]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"] == 64
        assert figures["loss"] == pytest.approx(expected_loss, rel=1e-5)
        assert figures["accuracy"] == pytest.approx(expected_accuracy)


def test_evaluate_numbers_the_classes_as_the_network_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from offload_sparse.workloads.data.loader import EvalLoader
    from offload_sparse.workloads.data.source import load_splits

    config = RunConfig().data
    config.limit = 64
    splits = load_splits(config)
    network = exported_run(tmp_path, class_names=splits.class_names[::-1])
    (batch,) = EvalLoader(splits.test, config)
    with torch.no_grad():
        logits = network((batch.images / 255 - 0.25) / 0.5)
    assert cli.main(["evaluate", "--json", str(tmp_path)]) == 0
    expected = float((logits.argmax(1) == 9 - batch.labels).double().mean())
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(expected)


def test_images_that_the_network_does_not_know_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported_run(tmp_path / "flat", "offload_sparse/mlp", shape=[1, 28, 28])
    message = error_of(["evaluate", str(tmp_path / "flat"), "--data.image_size", "20"], capsys)
    assert "trained on 1x28x28, cannot be evaluated on images of 1x20x20" in message
    assert "(set data.image_size to 28)" in message
    exported_run(tmp_path / "few", class_names=["Bag", "Coat"])
    message = error_of(["evaluate", str(tmp_path / "few")], capsys)
    assert "has labels outside the 2 classes of the network, such as 'Ankle boot'" in message


def test_evaluate_takes_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported_run(tmp_path)
    losses = []
    for more in ([], ["--data.eval_resize", "32"], ["--data.train_crop", "resized"]):
        argv = ["evaluate", str(tmp_path), "--split", "train", "--data.limit", "32", "--json", *more]
        assert cli.main(argv) == 0
        figures = json.loads(capsys.readouterr().out)
        assert (figures["split"], figures["images"]) == ("train", 32)
        losses.append(figures["loss"])
    assert losses[0] == losses[2] != losses[1], "what suits the size of the run's images"
    assert "no validation images" in error_of(["evaluate", str(tmp_path), "--split", "validation"], capsys)
