"""Whatever a configuration, a checkpoint or an export looks like: one line, exit code 2, nothing changed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from offload_sparse.cli.main import main
from offload_sparse.run import trainer
from tests.support import malformed
from tests.support.hostile_files import bounded

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS, CHECKPOINTS, EXPORTS = 300, 50, 20
_RUN = [
    *("train", "--method", "dense", "--model.name", "offload_sparse/mlp", "--data.limit", "64"),
    *("--model.arguments", "{stream: 8, hidden: 8, depth: 1}", "--data.batch_size", "32"),
    *("--train.max_steps", "2", "--quiet", "true", "--train.check", "false", "--train.eval_every", "0"),
]


def contents(folder: Path) -> dict[str, str]:
    """The bytes of everything in ``folder``, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refusal(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with the way that a mistake is told; empty when it is told as it should be."""
    before = contents(folder)
    capsys.readouterr()
    try:
        code: object = main(argv)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("offload-sparse: error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in error or not error.endswith(lines[-1] + "\n"):
        return f"exit code {code}, {error[-300:]!r}"
    if not lines[0].isprintable():
        return f"not printable: {lines[0]!r}"
    return "" if contents(folder) == before else "a file has changed"


def write(folder: Path, text: str | bytes | None) -> None:
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (folder / "config.yaml").write_bytes(data)


def test_malformed_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def accepted(config: object) -> None:
        raise AssertionError("the configuration was accepted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "train", accepted)
    wrong, count = [], 0
    for argv, text in malformed.configurations(CONFIGURATIONS):
        write(tmp_path, text)
        count += 1
        with bounded():
            problem = refusal(["train", *argv], tmp_path, capsys)
        if problem:
            wrong.append((argv if text is None else text[:200], problem))
    assert count == CONFIGURATIONS >= 300
    assert not wrong, f"{len(wrong)}\n" + "\n".join(map(str, wrong))


def test_a_sample_of_them_in_processes_of_their_own(tmp_path: Path) -> None:
    chosen = random.Random(1).sample(list(malformed.configurations(CONFIGURATIONS)), 12)
    for argv, text in [c for c in chosen if not any("\0" in word for word in c[0])]:
        write(tmp_path, text)
        before = contents(tmp_path)
        result = subprocess.run(
            [sys.executable, "-m", "offload_sparse.cli", "train", *argv],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("offload-sparse: error: ")
        assert len(result.stderr.splitlines()) == 1
        assert contents(tmp_path) == before


# --- files ---------------------------------------------------------------------------------------------


def _truncated(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def _flipped(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(data))


def _lengthened(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randrange(1, 64)))


def _overwritten(path: Path, generator: random.Random) -> None:
    path.write_bytes(generator.randbytes(path.stat().st_size))


def _removed(path: Path, generator: random.Random) -> None:
    del generator
    path.unlink()


def _a_folder(path: Path, generator: random.Random) -> None:
    del generator
    path.unlink()
    path.mkdir()


_DAMAGES: list[Callable[[Path, random.Random], None]] = [
    *(_truncated, _truncated, _flipped, _flipped, _flipped, _lengthened, _overwritten, _removed, _a_folder)
]


def _other_values(path: Path, generator: random.Random) -> None:
    """JSON that lacks a key, or has another value, or a path that leads out of its folder."""
    document = json.loads(path.read_text())
    node = document
    while True:
        if isinstance(node, dict) and node:
            key: object = generator.choice(sorted(node))
        elif isinstance(node, list) and node:
            key = generator.randrange(len(node))
        else:
            return
        inner = node[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner or generator.random() < 0.3:
            break
        node = inner
    change = generator.randrange(4)
    if change == 0 and isinstance(node, dict):
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node["../../escaped"] = node.pop(key)
    else:
        values = ["../../etc/passwd", -1, 10**18, None, {}, [1, -2], "x" * 50]
        node[key] = generator.choice([value for value in values if value != node[key]])  # type: ignore[index]
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that has come to its end, so that it has an export."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*_RUN, "--run_dir", str(folder)]) == 0
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


def test_damaged_exports(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator, wrong = random.Random(2), []
    for number in range(EXPORTS):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy)
        name = generator.choice(["structure.json", "weights.safetensors"])
        change = generator.choice([*_DAMAGES, *([_other_values] * 6 if name == "structure.json" else [])])
        change(copy / "model" / name, generator)
        if problem := refusal(["evaluate", str(copy)], copy, capsys):
            wrong.append((number, name, change.__name__, problem))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
def test_damaged_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only checkpoint of a run that was stopped: the same command refuses, and leaves all as it is."""
    original, good = trainer.Run.train_step, tmp_path / "good"
    with monkeypatch.context() as patch:

        def train_step(run: trainer.Run, step: int, batch: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            original(run, step, batch)  # type: ignore[arg-type]

        patch.setattr(trainer.Run, "train_step", train_step)
        assert main([*_RUN, "--run_dir", str(good)]) == 0
    generator, wrong, copy = random.Random(3), [], tmp_path / "copy"
    for number in range(CHECKPOINTS):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        (checkpoint,) = (copy / "checkpoints").glob("step_*")
        name = generator.choice(["manifest.json", "rank_0.safetensors"])
        change = generator.choice([*_DAMAGES, *([_other_values] * 6 if name == "manifest.json" else [])])
        change(checkpoint / name, generator)
        AcceleratorState._reset_state(reset_partial_state=True)
        if problem := refusal([*_RUN, "--run_dir", str(copy)], copy, capsys):
            wrong.append((number, name, change.__name__, problem))
    assert not wrong, "\n".join(map(str, wrong))
