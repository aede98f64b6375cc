"""``offload-sparse evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offload_sparse.cli.table import show
from offload_sparse.config import parse as arguments
from offload_sparse.config.parse import PROGRAM, Options
from offload_sparse.workloads.config import DataConfig

if TYPE_CHECKING:
    from offload_sparse.run.evaluation import Evaluation


@dataclass
class EvaluateConfig:
    """Measure accuracy and loss of a network that a run has left, in any of its formats.

    Attributes:
        path: run folder, the folder ``model/`` of a run, or what ``offload-sparse export`` has written.
        split: which images to measure on, as the run's configuration names them.
        json: print one JSON object instead of a table.
        trust: open a torch.export program (model.pt2) too; reading one can run any code.
        data: which images are read; values that are not given are those of the run.
    """

    path: Path
    split: Literal["test", "train", "validation"] = "test"
    json: bool = False
    trust: bool = False
    data: DataConfig = field(default_factory=DataConfig)


_OPTIONS = Options(
    EvaluateConfig,
    f"{PROGRAM} evaluate",
    (
        f"{PROGRAM} evaluate runs/quickstart",
        f"{PROGRAM} evaluate runs/quickstart/export/onnx --split train --json",
    ),
    positional=("path",),
)


def evaluate(argv: Sequence[str]) -> int:
    """Measure accuracy and loss of the network that a run has exported."""
    path = _OPTIONS.parse(argv).path
    config = _OPTIONS.parse(argv, defaults=_data_of_run(path))
    result = _evaluate(config)
    figures = {
        "path": str(path),
        "dataset": config.data.name,
        "split": config.split,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "images": result.count,
    }
    show(figures, config.json)
    return 0


def _data_of_run(path: Path) -> dict[str, Any]:
    """The data section of the run that ``path`` belongs to, by dotted name; empty without a config.yaml."""
    for folder in (path, *path.resolve().parents[:3]):
        if (folder / "config.yaml").is_file():
            return arguments.flat_values(arguments.parse(["--config", str(folder / "config.yaml")]), "data")
    return {}


def _evaluate(config: EvaluateConfig) -> Evaluation:
    from offload_sparse.export.open import open_artefact
    from offload_sparse.run import evaluation
    from offload_sparse.workloads.data.loader import EvalLoader
    from offload_sparse.workloads.data.normalise import Normalise
    from offload_sparse.workloads.data.source import load_splits

    opened = open_artefact(config.path, config.trust)
    mean, std = opened.preprocessing.mean, opened.preprocessing.std
    if not mean:
        raise ValueError(
            f"{config.path} does not say how its images are normalised; evaluate it in your own loop"
        )
    split = getattr(load_splits(config.data), config.split)
    if split is None:
        raise ValueError("no validation images; set --data.validation to a share or a split")
    normalise = Normalise(mean, std, opened.dtype).to(opened.device)
    loader = EvalLoader(split, config.data, channels=len(mean))
    return evaluation.evaluate(opened.network, loader, normalise, opened.device)
