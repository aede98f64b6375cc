"""Real launches: ``accelerate launch`` as a user types it, on two CPU processes, and ways to get it wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from offload_sparse import load_pruned
from offload_sparse.engine.rounds import CHECK_RANKS
from tests.support.launches import ROOT, SMALL, launch, two_ranks


def read(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads((run_dir / "summary.json").read_text()), [json.loads(line) for line in lines]


REQUIRED = {
    "method",
    "model",
    "dataset",
    "rho",
    "steps",
    "world_size",
    "test_accuracy",
    "params_ratio",
    "flops_ratio",
    "train_cost_saving",
    "seconds",
    "step_seconds_median",
    "peak_host_bytes",
    "peak_device_bytes",
    "store_bytes",
    "subnet_bytes_peak",
}


def test_two_processes_train_what_one_process_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, the same s, the same final network, from the same global batches, in float64.

    BatchNorm normalises with its running statistics: per-rank batch statistics would differ by construction.
    """
    options = [*SMALL, "--train.precision", "float64", "--train.batch_norm", "frozen"]
    options += ["--train.max_steps", "12", "--train.log_every", "1"]
    options += ["--round.freeze_at", "0.75"]
    monkeypatch.setenv(CHECK_RANKS, "1")
    alone = launch([*options, "--run_dir", str(tmp_path / "one")], ["--cpu", "--num_processes", "1"])
    assert alone.returncode == 0, alone.stderr
    together = two_ranks([*options, "--run_dir", str(tmp_path / "two")], port=29611, typed=True)
    assert together.returncode == 0, together.stderr
    (one, one_lines), (two, two_lines) = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.keys() >= REQUIRED
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["store_bytes"] < 0.6 * one["store_bytes"]
    for a, b in zip(one_lines, two_lines, strict=True):
        for key in a.keys() & {"loss", "accuracy", "entropy", "loss_difference", "expected_size"}:
            assert b[key] == pytest.approx(a[key], rel=1e-8, abs=1e-8), (a["step"], key)
    networks = [load_pruned(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    for name, value in networks[0].items():
        assert float((value - networks[1][name]).abs().max()) < 1e-8, name
    assert one["test_accuracy"] == two["test_accuracy"]


@pytest.mark.parametrize("method", ["dense", "static"])
def test_the_controls_train_under_the_same_command(method: str, tmp_path: Path) -> None:
    options = [*SMALL, "--method", method, "--train.max_steps", "4", "--run_dir", str(tmp_path)]
    result = two_ranks(options, port=29612)
    assert result.returncode == 0, result.stderr
    summary, _ = read(tmp_path)
    assert summary["method"] == method
    assert summary["flops_ratio"] == (1.0 if method == "dense" else pytest.approx(1 / 16, rel=0.5))
    assert summary["train_cost_saving"] == pytest.approx(1 / summary["flops_ratio"])
    assert load_pruned(tmp_path / "model") is not None


def test_ranks_that_accelerate_starts_alone_are_an_error(tmp_path: Path) -> None:
    """``--cpu --num_processes 2`` starts one process; it says so, instead of training alone."""
    result = launch([*SMALL, "--run_dir", str(tmp_path / "run")], ["--cpu", "--num_processes", "2"])
    assert result.returncode != 0
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_batch_that_does_not_divide_is_told_once_and_ends_both_ranks(tmp_path: Path) -> None:
    result = two_ranks([*SMALL, "--data.batch_size", "33", "--run_dir", str(tmp_path)], port=29613)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("offload-sparse: error:")]
    assert len(lines) == 1
    assert "33" in lines[0]


def test_ranks_whose_copies_of_the_images_differ_are_told_so(tmp_path: Path) -> None:
    """They would wait for each other, or train on with other images than those of one rank."""
    for rank, split, number in product(range(2), ("train", "test"), range(8)):
        image = tmp_path / f"home{rank}" / "data" / split / f"c{number % 2}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(image)
    (tmp_path / "home1/data/train/c1/7.png").unlink()
    script = tmp_path / "train.py"
    script.write_text(
        "import os, runpy, sys\n"
        "os.environ['HOME'] += os.environ['RANK']\n"
        "sys.argv.insert(1, 'train')\n"
        "runpy.run_module('offload_sparse.cli', run_name='__main__')\n"
    )
    options = [*SMALL, "--data.name", "~/data", "--data.limit", "0", "--data.batch_size", "2"]
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "29614"]
    places = {"HOME": str(tmp_path / "home"), "ACCELERATE_USE_CPU": "true"}
    result = launch([*options, "--run_dir", str(tmp_path / "run")], launcher, str(script), **places)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("offload-sparse: error:")]
    assert "the data set is 8 train, 8 test images of 2 classes" in line
    assert "on rank 0 and 7 train, 8 test images of 2 classes" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_launchers_that_meet_by_c10d_train_as_two_nodes_would(tmp_path: Path) -> None:
    """launch/multi_node.yaml with two machines, both of them this one."""
    options = [*SMALL, "--train.max_steps", "4", "--run_dir", str(tmp_path), "--train.log_every", "1"]
    clean = {
        k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    launchers = []
    for node in range(2):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "launch/multi_node.yaml",
        ]
        command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(node)]
        command += [
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            "29651",
            "launch/train.py",
            *options,
        ]
        launchers.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [launcher.communicate(timeout=280) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    summary, lines = read(tmp_path)
    assert (summary["world_size"], summary["steps"]) == (2, 4)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    printed = "".join(out + err for out, err in outputs)
    assert printed.count("run folder:") == 1, "one rank speaks for all"
    assert printed.count("epoch 1/") == 1


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_begins_with_the_line_that_uses_it(file: Path) -> None:
    comments = [line for line in file.read_text().splitlines() if line.startswith("#   ")]
    assert f"--config_file launch/{file.name}" in comments[0]
    assert "launch/train.py --config configs/quickstart.yaml" in comments[0]
