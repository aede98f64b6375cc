"""A folder that can be pushed to the Hugging Face Hub as it is: a model card beside the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from offload_sparse.export.network_file import Structure, copy_network, read_structure
from offload_sparse.store.files import write_file

CARD_FILE = "README.md"
_LIBRARY = "offload-sparse"

_FIGURES = (
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("params_ratio", "parameters kept", "{:.2%}"),
    ("flops_ratio", "FLOPs kept", "{:.2%}"),
    ("train_cost_saving", "training cost, times less than dense", "{:.2f}"),
    ("steps", "optimizer steps", "{}"),
    ("rho", "remaining ratio of channels asked for", "{:g}"),
    ("method", "method", "{}"),
    ("seconds", "seconds of training", "{:.0f}"),
    ("world_size", "processes", "{}"),
    ("device", "device", "{}"),
)


def write_hub_folder(source: Path, target: Path, summary: dict[str, Any]) -> None:
    """Write the network of ``source`` and its model card, with the figures of the run's ``summary.json``, to
    ``target``; nothing is uploaded. Raises ValueError: the network is missing or damaged."""
    copy_network(source, target)
    write_file(target / CARD_FILE, model_card(read_structure(target), summary))


def is_card(path: Path) -> bool:
    """Whether a file is a card that was written here."""
    return path.is_file() and f"library_name: {_LIBRARY}".encode() in path.read_bytes()


def model_card(structure: Structure, summary: dict[str, Any]) -> str:
    """The card: metadata as the Hub reads it, then what a reader wants to know."""
    name = str(structure.model.get("name", "a network"))
    short = f"{name.rpartition('/')[2]}-pruned"
    facts = structure.preprocessing
    metadata = yaml.safe_dump(_metadata(short, summary), sort_keys=False).strip()
    lines = [
        f"---\n{metadata}\n---",
        f"# {short}",
        f"`{name}`, narrowed while it was trained: the channels that are left out below are no part of the "
        "network, and its tensors are small and dense. Trained by Offload-Sparse.",
    ]
    figures = [(label, form, summary.get(key)) for key, label, form in _FIGURES]
    rows = [(label, form.format(value)) for label, form, value in figures if _is_figure(value, form)]
    if rows:
        lines += ["## Figures", _table(("", ""), rows)]
    usage = (
        "```python\nfrom huggingface_hub import snapshot_download\nfrom offload_sparse import load_pruned\n\n"
        'network = load_pruned(snapshot_download("<user>/<repository>"))  # nn.Module in evaluation mode\n```'
    )
    lines += ["## Use", usage]
    if facts.shape:
        lines.append(f"Images: {' x '.join(map(str, facts.shape))} (channels, height, width).")
    if facts.mean:
        mean, std = ([round(value, 4) for value in values] for values in (facts.mean, facts.std))
        lines.append(
            f"Pixels are scaled to [0, 1], then normalised with mean {mean} and standard deviation {std}."
        )
    if facts.class_names:
        lines.append("Classes: " + ", ".join(facts.class_names) + ".")
    widths = [(name, f"{len(group.kept)} of {group.size}") for name, group in structure.groups.items()]
    if widths:
        lines += ["## Widths", _table(("group", "channels kept"), widths)]
    lines.append(
        "`weights.safetensors` holds the tensors, `structure.json` the kept channels and the shape of every "
        "tensor; reading them runs no code from this folder."
    )
    return "\n\n".join(lines) + "\n"


def _metadata(short: str, summary: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": _LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": ["pruning", "structured-sparsity", _LIBRARY],
        "metrics": ["accuracy"],
    }
    accuracy = summary.get("test_accuracy")
    if _is_figure(accuracy, "{:.2%}"):
        dataset = _dataset_name(str(summary.get("dataset", "")))
        if "/" in dataset:
            metadata["datasets"] = [dataset]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [{"type": "accuracy", "value": accuracy}],
        }
        metadata["model-index"] = [{"name": short, "results": [result]}]
    return metadata


def _is_figure(value: Any, form: str) -> bool:
    """Whether a value of ``summary.json`` is what the card says of it: a text where there is no format."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number or (form == "{}" and isinstance(value, str) and len(value) <= 100 and value.isprintable())


def _dataset_name(name: str) -> str:
    """A name of the Hub as it is; the path of a folder on this machine is nobody else's business."""
    short = 0 < len(name) <= 100 and name.isprintable() and name.count("/") <= 1
    local = name.startswith((".", "/", "~")) or name.endswith(".parquet") or (short and Path(name).exists())
    return name if short and not local else "own-images"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)])
