"""Nothing that is read, be it a configuration or an exported model, can import or call what it should not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offload_sparse import load_pruned
from offload_sparse.config import parse as arguments


class Touch:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


CALL = {"class_path": "pathlib.Path.touch", "init_args": {"self": "SENTINEL"}}


@pytest.mark.parametrize(
    "name", ["optim", "optim.name", "optim.lr", "model", "run_dir", "checkpoint.keep", "trackers"]
)
def test_a_configuration_cannot_name_an_object_to_be_built(name: str, tmp_path: Path) -> None:
    text = json.dumps(CALL).replace("SENTINEL", str(tmp_path / "touched"))
    nested: Any = json.loads(text)
    for key in reversed(name.split(".")):
        nested = {key: nested}
    (tmp_path / "config.yaml").write_text(json.dumps(nested))
    for argv in (["--config", str(tmp_path / "config.yaml")], [f"--{name}", text]):
        if name == "run_dir" and argv[0] == "--run_dir":
            continue  # any text is the name of a folder
        with pytest.raises(ValueError) as error:
            arguments.parse(argv)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()


def test_an_argument_that_looks_like_an_object_is_a_mapping(tmp_path: Path) -> None:
    config = arguments.parse(["--model.arguments", json.dumps({"norm": CALL})])
    assert config.model.arguments == {"norm": CALL}


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:os"]
)
def test_yaml_tags_of_python_are_refused(tag: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"run_dir: {tag} ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError):
        arguments.parse(["--config", str(tmp_path / "config.yaml")])
    assert not (tmp_path / "made").exists()


def exported(folder: Path, **changes: Any) -> Path:
    structure: dict[str, Any] = {
        "format": 1,
        "model": {"name": "offload_sparse/vgg_small", "arguments": {"num_classes": 2}},
        "preprocessing": {},
        "groups": {},
        "tensors": {"weight": [2]},
    }
    folder.mkdir(exist_ok=True)
    (folder / "structure.json").write_text(json.dumps(structure | changes))
    save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
    return folder


def test_weights_that_are_a_pickle_are_not_unpickled(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match="is damaged"):
        load_pruned(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "model",
    [
        {"name": "offload_sparse/../../os.system", "arguments": {}},
        {"name": "timm/hf_hub:someone/model", "arguments": {"num_classes": 2}},
        {"name": "timm/resnet18", "arguments": {"num_classes": 2, "checkpoint_path": "/tmp/weights.pth"}},
        {"name": "timm/resnet18", "arguments": {"num_classes": 2, "pretrained": True}},
        {"name": "torchvision/resnet18", "arguments": {"num_classes": 2, "weights": "DEFAULT"}},
        {"name": 3, "arguments": []},
    ],
)
def test_an_exported_model_names_a_known_network(
    model: dict[str, Any], tmp_path: Path
) -> None:
    """And loads no other weights."""
    with pytest.raises(ValueError) as error:
        load_pruned(exported(tmp_path, model=model))
    assert "\n" not in str(error.value)
