"""A run from configuration to summary, on images made here; and each kind of bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.engine.config import OptimConfig
from offload_sparse.policy import width_search
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run import trainer
from offload_sparse.run.schedule import learning_rate
from tests.support.image_runs import options
from tests.workloads.data.images import pixels, table, write_parquet


@pytest.mark.parametrize("method", ["sparse_offload", "dense", "static"])
def test_a_run_leaves_its_configuration_metrics_summary_and_network(
    method: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lively = ("--optim.lr", "0.05", "--round.freeze_at", "0.8")
    assert main(options(images, tmp_path / "run", "--method", method, *lively)) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert sum("test_accuracy" in line for line in lines) == 1, "the end of the first epoch"
    epochs = [line for line in lines if "flops_ratio" in line]
    assert [line["step"] for line in epochs] == [6, 12]
    assert epochs[-1]["flops_ratio"] == pytest.approx(summary["flops_ratio"])
    assert epochs[-1]["params_ratio"] == pytest.approx(summary["params_ratio"])
    search = {"entropy", "deaths", "revivals", "group_keep", "mask_overlap", "loss_difference_std"}
    assert (search <= epochs[0].keys()) == (method == "sparse_offload")
    assert summary["steps"] == 12
    assert 0 <= summary["test_accuracy"] <= 1
    network = load_pruned(tmp_path / "run" / "model")
    assert network(torch.zeros(3, 1, 12, 12)).shape == (3, 2)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(summary["test_accuracy"])


def test_every_epoch_has_figures_of_its_own(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However short it is; on the lines for people, too."""
    more = ("--train.log_every", "50", "--train.check", "false", "--quiet", "false")
    assert main([*options(images, tmp_path / "run"), *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: f"loss {line['loss']:.4g} " for line in lines if "loss" in line}
    assert list(losses) == [6, 12]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(told) == 2
    assert all(loss in line for loss, line in zip(losses.values(), told, strict=True))


def rates(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


def test_every_cycle_of_a_search_has_a_schedule_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warm-up; the last one, which trains what was found, too."""
    monkeypatch.setattr(PolicyConfig, "cycle_steps", 10)
    monkeypatch.setattr(width_search, "PROBE_SHARE", 2.0)
    more = ("--policy.search", "probe", "--round.freeze_at", "0.6", "--optim.warmup_epochs", "0.5")
    length = ("--train.epochs", "6", "--train.log_every", "1", "--train.check", "false")
    assert main(options(images, tmp_path / "run", *more, *length)) == 0
    config = OptimConfig(warmup_epochs=0.5)
    expected = [learning_rate(config, step, n, 6, cycle=True) for n in (11, 11, 14) for step in range(n)]
    assert rates(tmp_path / "run") == pytest.approx(expected)


def test_a_warm_up_begins_with_the_first_step_that_trains(images: Path, tmp_path: Path) -> None:
    """A search by forward passes compares masks before; two of four epochs are its, half of them compare."""
    more = ("--policy.search", "forward", "--round.freeze_at", "0.5", "--optim.warmup_epochs", "1")
    length = ("--train.epochs", "4", "--train.log_every", "1", "--train.check", "false")
    assert main(options(images, tmp_path / "run", *more, *length)) == 0
    expected = [learning_rate(OptimConfig(warmup_epochs=1), step, 18, 6) for step in range(18)]
    assert rates(tmp_path / "run")[6:] == pytest.approx(expected)


def test_bf16_autocast_keeps_weights_in_float32(images: Path, tmp_path: Path) -> None:
    assert main(options(images, tmp_path / "run", "--train.precision", "bf16", "--train.check", "false")) == 0
    assert all(p.dtype == torch.float32 for p in load_pruned(tmp_path / "run" / "model").parameters())


def test_fp16_scales_the_loss_of_a_run_that_says_what_it_takes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside dense training, which has no scaled loss of its own."""
    more = ("--train.precision", "fp16", "--train.max_steps", "2", "--quiet", "false")
    assert main([*options(images, tmp_path / "run"), *more]) == 0
    assert "(dense " in capsys.readouterr().err
    assert all(p.dtype == torch.float32 for p in load_pruned(tmp_path / "run" / "model").parameters())


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--model.name", "offload_sparse/vgg_smal"], "vgg_small"),
        (["--model.name", "resnet18"], "torchvision/resnet18"),
        (["--data.name", "no_such_dataset_anywhere"], "no_such_dataset_anywhere"),
        (["--data.name", "./no/such/file.parquet"], "file.parquet"),
        (["--model.arguments.widht", "1"], "widht"),
        (["--model.name", "timm/dla34", "--data.image_size", "64", "--model.residual", "filter"], "trace"),
        (["--data.batch_size", "1000"], "batch_size"),
        (["--data.columns", "[image, class]"], "label"),
        (["--model.arguments.in_channels", "2"], "set it to 3, to which grey images are repeated"),
    ],
)
def test_bad_input_is_one_line_of_advice_and_exit_code_2(
    arguments: list[str], advice: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = options(images, tmp_path / "run")
    if "--model.name" in arguments or "--model.arguments.widht" in arguments:
        at = base.index("--model.arguments.width")
        del base[at : at + 2]
    assert main([*base, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1, errors
    assert errors[0].startswith("offload-sparse: error:")
    assert advice in errors[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12)])
def test_images_need_not_be_square(
    height: int,
    width: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What takes them is checked and trained with them; what takes squares only says so, by any method."""
    for split in ("train", "test"):
        rows = table(pixels(16, height, width), [i % 2 for i in range(16)], ("a", "b"))
        write_parquet(tmp_path / "data" / f"{split}.parquet", rows)
    planned: list[tuple[int, int]] = []
    monkeypatch.setattr(trainer, "check", lambda config, data, machine: planned.append(data.image_shape))
    command = options(tmp_path / "data", tmp_path / "run")
    assert main([*command, "--train.max_steps", "1"]) == 0
    structure = json.loads((tmp_path / "run" / "model" / "structure.json").read_text())
    assert planned == [(height, width)]
    assert structure["preprocessing"]["shape"] == [1, height, width]
    assert structure["model"]["arguments"]["image_size"] == 12, "the shorter side"
    capsys.readouterr()
    for method in ("dense", "sparse_offload"):
        squares = ["--model.name", "offload_sparse/mlp", "--method", method, "--overwrite", "true"]
        assert main([*command, *squares]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"does not take 1 x {height} x {width} images" in line
        assert "set data.image_size, which makes squares" in line


def test_grey_images_are_repeated_for_a_network_that_is_to_take_colours(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that begins with weights of such images does."""
    colours = ("--model.arguments.in_channels", "3", "--train.max_steps", "2")
    assert main([*options(images, tmp_path), *colours]) == 0
    assert load_pruned(tmp_path / "model").state_dict()["features.0.weight"].shape[1] == 3
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    loss = json.loads((tmp_path / "summary.json").read_text())["test_loss"]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_diverging_run_stops_with_advice(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--optim.lr", "1e30", "--train.check", "false"]
    assert main(options(images, tmp_path / "run", *arguments)) == 1
    assert "lower optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("freeze_at", "steps", "says"),
    [
        ("auto", 6396, "search: none, too short a run for one to pay"),
        ("0.25", 12, "search: none, a cycle takes 150 steps and there are 3; widths stay"),
        ("0.25", 2, "search: none, a cycle takes 150 steps and there are 0; widths stay"),
        ("0.25", 1600, "search: widths move after one cycle, in the first 400 steps"),
        ("auto", 6400, "search: widths move after each of 2 cycles, in the first 1,600 steps"),
        ("0.5 on 12 groups", 300, "search: none, 300 steps are too few to compare 12 groups"),
        ("auto", 6401, "search: none, no other group of channels could become narrower for this one to grow"),
    ],
)
def test_a_run_says_when_its_widths_move(
    freeze_at: str,
    steps: int,
    says: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stops(*_: object) -> None:
        raise ValueError("far enough")

    monkeypatch.setattr(trainer.Progress, "begin", stops)
    more = ["--policy.search", "auto", "--round.freeze_at", freeze_at.split()[0]]
    if "groups" in freeze_at:
        more += ["--model.name", "offload_sparse/mlp", "--model.arguments.depth", "11"]
        more += ["--model.arguments.stream", "32", "--model.arguments.hidden", "32"]
    more += ["--train.max_steps", str(steps), "--train.epochs", "2000"]
    if steps == 6401:
        more += ["--model.name", "offload_sparse/mlp", "--model.residual", "internal"]
        more += ["--model.arguments.depth", "1"]
    assert main(options(images, tmp_path / "run", *more, "--quiet", "false")) == 2
    assert says in " ".join(capsys.readouterr().err.split())
