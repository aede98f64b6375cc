"""Files of networks and runs with random changes whose digests fit again: a clean refusal, or no harm.

The default tests try a few of each kind; ``pytest -m slow tests/attacks`` tries all that are promised.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from offload_sparse.cli.main import main
from offload_sparse.config.parse import RUN_OPTIONS
from offload_sparse.export import network_file
from offload_sparse.export.open import open_artefact
from offload_sparse.inspect.report.run_data import AXES, read_runs
from offload_sparse.run import resume as starts
from offload_sparse.run import trainer
from offload_sparse.run.errors import RunError
from offload_sparse.run.log import kept_lines, step_of
from offload_sparse.run.trainer import train
from offload_sparse.workloads.data.source import load_splits
from tests.support.hostile_files import (
    RAW,
    SECONDS,
    attempt,
    bounded,
    change_header,
    mutated,
    run_once,
    sign_description,
    sign_manifest,
    sign_structure,
)

Change = Callable[[Path, random.Random], None]

FEW = {
    "structure": 24,
    "description": 20,
    "summary": 20,
    "manifest": 6,
    "store": 10,
    "ahead": 10,
    "log": 20,
    "header": 20,
    "onnx": 10,
}
TOGETHER = 30
GRAPHS = ("vgg_small", "lenet_300_100")
ALL = dict.fromkeys(FEW, 600) | {"header": 200, "onnx": 50}
RUN = [
    *("--model.name", "offload_sparse/mlp", "--model.arguments", "{stream: 12, hidden: 24, depth: 1}"),
    *("--data.limit", "24", "--data.batch_size", "8", "--train.max_steps", "6", "--checkpoint.every", "3"),
    *("--policy.search", "sampled"),
    *("--round.k", "3", "--train.check", "false", "--quiet", "true", "--trackers", "[]"),
]
COUNTS = [pytest.param(FEW, id="few"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three steps, on both tiers."""
    folder = tmp_path_factory.mktemp("runs")
    for tier in ("ram", "file"):
        short = ["--train.max_steps", "3", "--store.tier", tier]
        outcome = attempt(partial(resume, folder / tier, short), folder / tier, may_write=True)
        assert not outcome.trouble + outcome.said, outcome
    return folder


def resume(run_dir: Path, more: Sequence[str] = ()) -> None:
    """Train three more steps."""
    network_file.compare = lambda *_: 0.0
    try:
        train(_parsed((*RUN, "--run_dir", str(run_dir), *more)))
    except (RunError, FloatingPointError) as error:
        raise ValueError(str(error)) from error


_parsed = cache(RUN_OPTIONS.parse)


def resume_all(
    folder: Path, source: Path, change: Change, numbers: Sequence[int], more: Sequence[str]
) -> int:
    """Change copies of a run in turn, and resume each; how many were refused. What no change touches
    (settings, images) is read once.
    """
    starts._saved = cache(starts._saved)
    splits = cache(lambda text: load_splits(_parsed(tuple(RUN)).data))
    trainer.load_splits = lambda config: splits(repr(config))  # type: ignore[attr-defined]
    refused = 0
    for number in numbers:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder, random.Random(number))
        AcceleratorState._reset_state(reset_partial_state=True)
        said = ""
        try:
            with bounded():
                resume(folder, more)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            refused += 1
        except BaseException as error:
            error.add_note(f"change {number}")
            raise
        assert "\n" not in said, (number, said)
        assert len(said) <= 1000, (number, said)
    return refused


def opened(folder: Path) -> None:
    network = open_artefact(folder)
    run_once(network.network, tuple(network.preprocessing.shape)[:3])


def tried(
    sources: list[Path],
    count: int,
    change: Change,
    tmp_path: Path,
    action: Callable[[Path], object] = opened,
) -> int:
    """Change and open ``count`` copies in turn; how many were refused. None may make trouble."""
    refused = 0
    for number in range(count):
        folder = tmp_path / "place" / "network"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(sources[number % len(sources)], folder)
        change(folder, random.Random(number))
        outcome = attempt(partial(action, folder), folder)
        assert not outcome.trouble, (number, outcome)
        refused += bool(outcome.said)
    return refused


def tried_resuming(
    source: Path, count: int, change: Change, tmp_path: Path, more: Sequence[str] = ()
) -> None:
    """As ``tried``, of runs that are resumed, several in one process; some must be, and some refused."""
    refused = 0
    for first in range(0, count, TOGETHER):
        folder = tmp_path / "place" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(first, min(first + TOGETHER, count))
        action = partial(resume_all, folder, source, change, numbers, more)
        outcome = attempt(action, folder, may_write=True, seconds=SECONDS * TOGETHER)
        assert not outcome.trouble, (numbers, outcome)
        refused += int(outcome.said)
    assert 0 < refused < count


def change_document(name: str, sign: Callable[[Path, Any], None]) -> Change:
    def change(folder: Path, generator: random.Random) -> None:
        content = (folder / name).read_bytes()
        if generator.random() < 0.05:  # no JSON, or none of a kind that a library writes
            at = generator.randrange(len(content))
            (folder / name).write_bytes(content[:at] + generator.choice(RAW) + content[at:])
        else:
            sign(folder, mutated(json.loads(content), generator))

    return change


def plain(exported: Path) -> list[Path]:
    return [exported / name for name in ("vgg_small", "resnet20_cifar", "lenet_300_100")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_structures(counts: dict[str, int], exported: Path, tmp_path: Path) -> None:
    change = change_document("structure.json", sign_structure)
    assert tried(plain(exported), counts["structure"], change, tmp_path) > counts["structure"] / 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_descriptions(counts: dict[str, int], exported: Path, tmp_path: Path) -> None:
    sources = [exported / f"{name}_onnx" for name in GRAPHS]
    change = change_document("network.json", sign_description)
    assert tried(sources, counts["description"], change, tmp_path) > counts["description"] / 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_summaries_beside_a_network(counts: dict[str, int], exported: Path, tmp_path: Path) -> None:
    """A model card is written of what can be read of ``summary.json``."""
    run = tmp_path / "run"
    shutil.copytree(exported / "vgg_small", run / "model")
    summary = {
        "test_accuracy": 0.5,
        "params_ratio": 0.25,
        "steps": 7,
        "dataset": "a/b",
        "rho": 0.5,
        "device": "cpu",
    }
    (run / "summary.json").write_text(json.dumps(summary))

    def sign(folder: Path, document: Any) -> None:
        (folder / "summary.json").write_text(json.dumps(document))

    change = change_document("summary.json", sign)
    tried([run], counts["summary"], change, tmp_path, card)


def card(folder: Path) -> None:
    from offload_sparse.export.convert import _summary
    from offload_sparse.export.hub import model_card
    from offload_sparse.export.network_file import read_structure

    model_card(read_structure(folder / "model"), _summary(folder))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("counts", COUNTS)
def test_manifests_of_checkpoints(counts: dict[str, int], runs: Path, tmp_path: Path) -> None:
    """A command that trains further resumes from them, or says why not."""
    tried_resuming(runs / "ram", counts["manifest"], change_manifest, tmp_path)


def change_manifest(folder: Path, generator: random.Random) -> None:
    """Half of the time in the run's own part, which is a small one."""
    checkpoint = folder / "checkpoints" / "step_00000003"
    if generator.random() < 0.5:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["run"] = mutated(manifest["run"], generator)
        sign_manifest(checkpoint, manifest)
    else:
        change_document("manifest.json", sign_manifest)(checkpoint, generator)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("counts", COUNTS)
def test_descriptions_of_stores(counts: dict[str, int], runs: Path, tmp_path: Path) -> None:
    more = ["--store.tier", "file"]
    tried_resuming(runs / "file", counts["store"], change_store, tmp_path, more)


def change_store(folder: Path, generator: random.Random) -> None:
    def sign(inner: Path, document: Any) -> None:
        (inner / "store.json").write_text(json.dumps(document))

    change_document("store.json", sign)(folder / "store" / "rank0", generator)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("counts", COUNTS)
def test_states_beside_a_store(counts: dict[str, int], runs: Path, tmp_path: Path) -> None:
    """What the newest write-ahead log says of a run."""
    more = ["--store.tier", "file"]
    tried_resuming(runs / "file", counts["ahead"], change_state, tmp_path, more)


def change_state(folder: Path, generator: random.Random) -> None:
    def state(header: Any) -> Any:
        known = header["__metadata__"]
        known["state"] = json.dumps(mutated(json.loads(known["state"]), generator))
        return header if generator.random() < 0.9 else mutated(header, generator)

    change_header(max((folder / "store" / "rank0" / "log").iterdir()), state)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_logs_of_runs(counts: dict[str, int], runs: Path, tmp_path: Path) -> None:
    """A line that no run writes counts as none, for the run and for its report."""

    def change(folder: Path, generator: random.Random) -> None:
        lines = [line.encode() for line in (folder / "metrics.jsonl").read_text().splitlines()]
        at = generator.randrange(len(lines))
        new = [json.dumps(mutated(json.loads(lines[at]), generator)).encode(), *RAW]
        lines[at] = generator.choice(new) if generator.random() < 0.5 else new[0]
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    tried([runs / "ram"], counts["log"], change, tmp_path, log_read)


def log_read(folder: Path) -> None:
    assert all(step_of(line) <= 3 for line in kept_lines(folder / "metrics.jsonl", 3))
    (run,) = read_runs([folder])
    for axis in AXES:
        for name in {name for line in run.lines for name in line}:
            run.series(name, axis)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_safetensors_headers(counts: dict[str, int], exported: Path, tmp_path: Path) -> None:
    def change(folder: Path, generator: random.Random) -> None:
        change_header(folder / "weights.safetensors", lambda header: mutated(header, generator))
        sign_structure(folder, json.loads((folder / "structure.json").read_text()))

    assert tried(plain(exported), counts["header"], change, tmp_path) > counts["header"] / 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("counts", COUNTS)
def test_onnx_files(counts: dict[str, int], exported: Path, tmp_path: Path) -> None:
    def change(folder: Path, generator: random.Random) -> None:
        content = bytearray((folder / "model.onnx").read_bytes())
        for _ in range(generator.choice((1, 2, 8))):
            at = generator.randrange(len(content))
            if generator.random() < 0.5:
                content[at] = generator.randrange(256)
            else:
                del content[at : at + generator.randrange(1, 5)]
        (folder / "model.onnx").write_bytes(content)
        sign_description(folder, json.loads((folder / "network.json").read_text()))

    sources = [exported / f"{name}_onnx" for name in GRAPHS]
    tried(sources, counts["onnx"], change, tmp_path)


@pytest.mark.parametrize("name", ["structure.json", "weights.safetensors"])
def test_the_command_says_one_line(
    name: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported / "vgg_small", tmp_path / "network"))
    (folder / name).write_bytes(b"\x1b[2J\n" * 1000)
    assert main(["evaluate", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
