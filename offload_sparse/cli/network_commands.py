"""The commands that read a network that a run has left: ``evaluate`` and ``export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offload_sparse.cli.table import show
from offload_sparse.config.parse import PROGRAM, RUN_OPTIONS, Options, flat_tree
from offload_sparse.workloads.config import DataConfig


@dataclass
class EvaluateConfig:
    """Measure accuracy and loss of a network that a run has left, in any of its formats.

    Attributes:
        path: run folder, one of its checkpoints, or what ``offload-sparse export`` has written.
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


def evaluate(argv: Sequence[str]) -> int:
    """Measure accuracy and loss of the network that a run has exported."""
    examples = (
        f"{PROGRAM} evaluate runs/quickstart",
        f"{PROGRAM} evaluate runs/quickstart/export/onnx --split train --json",
    )
    options = Options(EvaluateConfig, f"{PROGRAM} evaluate", examples)
    # The rest means something only with the data of the run that the path leads to.
    places = options.places(argv)
    config = options.parse(argv, defaults=_data_of_run(Path(places[0])) if places else {})
    result = _evaluate(config)
    figures = {
        "path": str(config.path),
        "dataset": config.data.name,
        "split": config.split,
        "accuracy": result.accuracy if config.json else f"{result.accuracy:.2%}",
        "loss": result.loss,
        "images": result.count,
    }
    show(figures, config.json)
    return 0


def _data_of_run(path: Path) -> dict[str, Any]:
    """The data section of the run that ``path`` belongs to, by dotted name; empty if it belongs to none."""
    from offload_sparse.run.log import CONFIG_FILE, run_around

    if (run := run_around(path)) is None:
        return {}
    of_run = flat_tree(RUN_OPTIONS.parse(["--config", str(run / CONFIG_FILE)]))
    return {name: value for name, value in of_run.items() if name.startswith("data.")}


def _evaluate(config: EvaluateConfig) -> Any:
    from offload_sparse.channels.require import Explained
    from offload_sparse.export.open import open_artefact
    from offload_sparse.run import evaluation
    from offload_sparse.run.checkpoint_network import exported
    from offload_sparse.workloads.data.loader import EvalLoader
    from offload_sparse.workloads.data.normalise import Normalise
    from offload_sparse.workloads.data.source import load_split, load_splits

    with exported(config.path, data=config.data) as path:
        opened = open_artefact(path, config.trust)
    mean, std, classes = opened.preprocessing.mean, opened.preprocessing.std, opened.preprocessing.class_names
    if not mean:
        raise ValueError(
            f"{config.path} does not say how its images are normalised; evaluate it in your own loop"
        )
    if classes:
        split = load_split(config.data, config.split, classes, len(mean))
    else:  # written by a loop that does not name them: they are numbered as in the images for training
        split = getattr(load_splits(config.data), config.split)
    if split is None:
        raise ValueError("no validation images; set --data.validation to a share or a split")
    normalise = Normalise(mean, std, opened.dtype).to(opened.device)
    loader = EvalLoader(split, config.data, channels=len(mean))
    shape, trained = (len(mean), loader.images.height, loader.images.width), opened.preprocessing.shape
    numbers, known = ("x".join(map(str, sizes)) for sizes in (shape, trained))
    told = f", trained on {known}," if trained not in ((), shape) else ""
    side = f" (set data.image_size to {trained[1]})" if told and trained[1] == trained[2] else ""
    before = f"the network{told} cannot be evaluated on images of {numbers}{side}: "
    with Explained(before, kinds=(RuntimeError, IndexError)):
        return evaluation.evaluate(opened.network, loader, normalise, opened.device)


@dataclass
class ExportConfig:
    """Write the network of a run for other programs, read it back and compare.

    Attributes:
        path: run folder, its folder ``model/``, or one of its checkpoints.
        format: ``safetensors`` writes tensors and structure.json; ``torch_export`` a program of torch.export
            (model.pt2); ``onnx`` a file for ONNX Runtime and others (model.onnx); ``hub`` a folder with a
            model card for the Hugging Face Hub, which is not uploaded.
        output: folder to write to; empty takes ``export/<format>`` in the folder of the run, and
            ``export/step_<n>_<format>`` for a checkpoint.
        budget: which member of a family, by its share in ``policy.budgets``; 0 takes the largest.
        json: print one JSON object instead of a table.
    """

    path: Path
    budget: float = 0.0
    format: Literal["safetensors", "torch_export", "onnx", "hub"] = "safetensors"
    output: str = ""
    json: bool = False


def export(argv: Sequence[str]) -> int:
    """Write the network of a run as safetensors, torch.export program, ONNX, or a folder for the Hub."""
    examples = (
        f"{PROGRAM} export runs/quickstart --format onnx",
        f"{PROGRAM} export runs/quickstart --format hub --output to_upload",
    )
    config = Options(ExportConfig, f"{PROGRAM} export", examples).parse(argv)
    from offload_sparse.export.convert import export_network
    from offload_sparse.run.checkpoint_network import exported, is_checkpoint, run_of

    output = Path(config.output).expanduser() if config.output else None
    if output is None and is_checkpoint(config.path):
        member = f"{config.budget:g}_" if config.budget else ""
        output = run_of(config.path) / "export" / f"{config.path.name}_{member}{config.format}"
    with exported(config.path, config.budget) as path:
        show(export_network(path, config.format, output), config.json)
    return 0
