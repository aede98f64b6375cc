"""Distillation: the full network's logits, once per image, kept where a killed pass goes on; and the loss."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offload_sparse import load_pruned
from offload_sparse.cli.main import main
from offload_sparse.config.run import RunConfig, TrainConfig
from offload_sparse.run import teacher as teacher_module
from offload_sparse.run.teacher import TEMPERATURE, Teacher, distilled
from offload_sparse.run.trainer import Run
from offload_sparse.store.files import remove
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.data.images import ImageSet
from offload_sparse.workloads.data.normalise import normalise_for
from offload_sparse.workloads.data.source import load_splits
from tests.support import image_runs
from tests.support.simulated_cuda import DEVICE, simulated_cuda


class Images:
    """Twenty images of two pixels."""

    def __init__(self) -> None:
        self.pixels = torch.randint(255, (20, 1, 1, 2), generator=torch.Generator().manual_seed(0)).byte()

    def __len__(self) -> int:
        return len(self.pixels)

    def decode(self, indices: Tensor) -> Any:
        return SimpleNamespace(pixels=self.pixels[indices])


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 3))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(teacher_module, "_IMAGES_PER_FILE", 8)
    monkeypatch.setattr(teacher_module, "BATCH", 3)
    built: list[nn.Module] = []

    def make() -> Teacher:
        def build() -> nn.Module:
            built.append(network())
            return built[-1]

        return Teacher(build, Images(), lambda x: x / 255, tmp_path / "teacher", 3)  # type: ignore[arg-type]

    return make, built, tmp_path / "teacher"


def test_every_image_has_the_logits_of_the_network(made: Any) -> None:
    """Whichever rank has computed them."""
    make, built, _ = made
    for rank in range(2):
        make().compute(rank, 2, quiet=True)
    teacher = make()
    teacher.open()
    indices = torch.tensor([19, 0, 8, 7, 7])
    expected = network()(Images().pixels[indices] / 255)
    torch.testing.assert_close(teacher(indices), expected, rtol=1e-3, atol=1e-3)
    assert len(built) == 2


def test_the_precision_of_a_training_is_not_that_of_its_teacher(made: Any) -> None:
    make, _, folder = made
    indices = torch.tensor([19, 0, 8, 7, 7])
    with torch.autocast("cpu", torch.bfloat16):
        found = make()(indices)
    remove(folder)
    assert torch.equal(found, make()(indices))


def test_a_pass_that_was_killed_goes_on_where_it_was(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make, built, folder = made
    make().compute(quiet=True)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 3
    (folder / "000001.bin").unlink()
    (folder / "000002.bin").write_bytes(b"half")
    make().compute()
    assert "8/20 " in capsys.readouterr().err, "its bar begins there, too"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    make().compute(quiet=True)
    assert len(built) == 2, "nothing was missing the third time"


def test_a_pass_that_is_asked_to_stop_keeps_whole_files(made: Any) -> None:
    """It is asked after each of three batches a file, on every rank alike, whatever a rank has to do."""
    make, _, folder = made
    for rank in range(2):
        answers = iter([False] * 6)
        assert make().compute(rank, 2, quiet=True, stop=answers.__next__)
        assert next(answers, None) is None
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    remove(folder)
    answers = iter([False, False, False, False, True])
    assert not make().compute(quiet=True, stop=answers.__next__)
    assert [path.name for path in folder.iterdir()] == ["000000.bin"]
    assert make().compute(quiet=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_rank_takes_no_logits_that_the_first_is_about_to_remove(made: Any) -> None:
    """The second of two ranks comes to its first wait before the first one begins the run."""
    make, built, folder = made
    make().compute(quiet=True)
    meet, waits, built[:] = threading.Barrier(2, timeout=60), threading.Event(), []

    def teach(rank: int) -> Teacher:
        def wait_for_everyone() -> None:
            waits.set()
            meet.wait()

        run = object.__new__(Run)
        run.config, run.teacher = RunConfig(quiet=True), make()
        run.progress = cast(Any, SimpleNamespace(asked_to_stop=lambda: False))
        run.accelerator = cast(Any, SimpleNamespace(process_index=rank, num_processes=2))
        run.accelerator.wait_for_everyone = wait_for_everyone  # type: ignore[method-assign]
        if rank == 0:
            waits.wait()
            remove(folder)
        run._teach()
        assert run.teacher is not None
        return run.teacher

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(teach, range(2))
    assert torch.equal(first(torch.arange(20)), second(torch.arange(20)))
    assert len(built) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_is_half_that_of_the_labels_and_half_the_divergence(dtype: torch.dtype) -> None:
    """It is not rounded where the network's own logits are."""
    logits, theirs = torch.randn(5, 4).to(dtype), torch.randn(5, 4).double()
    loss = torch.tensor(1.5).double()
    p, q = (torch.softmax(x / TEMPERATURE, 1) for x in (theirs, logits.double()))
    expected = 0.5 * loss + 0.5 * TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distilled(loss, logits, theirs).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distilled(loss, logits, logits), loss / 2)
    with simulated_cuda() as simulation:
        there = distilled(loss.to(DEVICE), logits.to(DEVICE), theirs)
        assert [what for what, *_ in simulation.waits] == ["upload"] * 2, "for the network's own logits"
        assert torch.equal(there.to("cpu"), distilled(loss, logits, theirs))


def train(images: Path, run_dir: Path, *more: str) -> int:
    """A run of three steps; its network has an output that no class needs, as one for more classes has."""
    outputs = ("--model.arguments.num_classes", "3")
    return image_runs.train(images, run_dir, "--train.max_steps", "3", *outputs, *more)


@pytest.fixture(scope="module")
def dense(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert train(images, folder, "--method", "dense") == 0
    return folder


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "removed"])
def test_a_checkpoint_of_a_search_is_chosen_by_the_logits_of_its_run(
    kept: bool, images: Path, tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--model.weights", str(dense), "--round.freeze_at", "1", "--checkpoint.every", "2")
    assert train(images, tmp_path, *more, "--train.distill", "true") == 0
    if not kept:
        remove(tmp_path / "teacher")
    before = image_runs.contents(tmp_path)
    losses = []
    for path in (tmp_path / "checkpoints" / "step_00000003", tmp_path):
        capsys.readouterr()
        assert main(["evaluate", str(path), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1], "the last checkpoint is the end of the run"
    assert image_runs.contents(tmp_path) == before


def test_a_run_learns_from_the_logits_of_its_start(images: Path, tmp_path: Path, dense: Path) -> None:
    more = ("--model.weights", str(dense), "--method", "static")
    assert train(images, tmp_path / "plain", *more) == 0
    assert train(images, tmp_path / "run", *more, "--train.distill", "true") == 0
    config = DataConfig(name=str(images))
    split = load_splits(config).train
    pixels = ImageSet(split, config, 1)
    found = np.fromfile(tmp_path / "run" / "teacher" / "000000.bin", np.float16).reshape(len(split), -1)
    full = load_pruned(dense / "model")
    with torch.no_grad():
        expected = full(normalise_for(pixels, config)(pixels.decode(torch.arange(len(split))).pixels))
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=1e-2, atol=1e-2)
    ends = [load_pruned(tmp_path / name / "model").state_dict() for name in ("plain", "run")]
    assert not torch.equal(ends[0]["features.0.weight"], ends[1]["features.0.weight"])


def test_logits_alone_teach_a_network_that_starts_afresh(images: Path, tmp_path: Path, dense: Path) -> None:
    """With a learning rate of 0 weights are those of the start; with another one they learn from them."""
    taught = ("--train.distill", "true", "--model.weights")
    weights = {}
    for name, more in {
        "fresh": ("--optim.lr", "0"),
        "fresh, taught": ("--optim.lr", "0", *taught, f"{dense}+logits_only"),
        "taught": (*taught, f"{dense}+logits_only"),
        "untaught": (),
        "started": (*taught, str(dense)),
    }.items():
        assert train(images, tmp_path / name, "--method", "static", *more) == 0
        weights[name] = load_pruned(tmp_path / name / "model").state_dict()["features.0.weight"]
    assert torch.equal(weights["fresh"], weights["fresh, taught"])
    assert not torch.equal(weights["taught"], weights["untaught"])
    logits = [(tmp_path / name / "teacher" / "000000.bin").read_bytes() for name in ("taught", "started")]
    assert logits[0] == logits[1]


def test_a_signal_ends_the_pass_and_the_same_command_resumes(
    images: Path,
    tmp_path: Path,
    dense: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(teacher_module, "_IMAGES_PER_FILE", 40)
    more = ("--model.weights", str(dense), "--method", "static", "--train.distill", "true")
    assert train(images, tmp_path / "straight", *more) == 0
    write = teacher_module.write_file

    def write_and_hear(path: Path, content: bytes) -> None:
        write(path, content)
        signal.raise_signal(signal.SIGTERM)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "write_file", write_and_hear)
        assert train(images, tmp_path / "parts", *more) == 0
    assert "stopped at step 0 (SIGTERM); the same command resumes" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts" / "teacher").iterdir()] == ["000000.bin"]
    assert train(images, tmp_path / "parts", *more) == 0
    ends = [tmp_path / name / "model" / "weights.safetensors" for name in ("straight", "parts")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_there_is_nothing_to_learn_from_without_weights() -> None:
    with pytest.raises(ValueError, match=r"give its weights with model\.weights"):
        RunConfig(train=TrainConfig(distill=True))
    assert not ModelConfig(weights="w+new_head+logits_only").has_teacher
    with pytest.raises(ValueError, match=r"for logits_only, and nothing .* set train\.distill true"):
        RunConfig(model=ModelConfig(weights="w+logits_only"))
    with pytest.raises(ValueError, match=r"\+logits_only, with no weights before it; give a path"):
        ModelConfig(weights="+logits_only")
