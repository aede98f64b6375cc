"""What an exported network that somebody else has made cannot do to its reader.

Each promise is followed by the attacks on it. Every attack is opened in a process of its own: it must end
within ten seconds and 1 GiB over the interpreter, write nothing, and say what is wrong in one line.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_sparse.export.network_file import load_pruned
from offload_sparse.export.open import open_artefact
from tests.support.hostile_files import (
    HUGE,
    attempt,
    change_header,
    run_once,
    sign_description,
    sign_structure,
)

Attack = Callable[[Path], None]
Opening = Callable[[Path], object]


def open_and_run(folder: Path) -> None:
    opened = open_artefact(folder)
    run_once(opened.network, tuple(opened.preprocessing.shape))


def harmless(attack: Attack, source: Path, tmp_path: Path, opening: Opening = open_and_run) -> str:
    """What is said about a copy of ``source`` after the attack; nothing where it can be opened."""
    folder = Path(shutil.copytree(source, tmp_path / "own"))
    attack(folder)
    outcome = attempt(lambda: opening(folder), folder)
    assert not outcome.trouble, outcome
    return outcome.said


def refused(attack: Attack, source: Path, tmp_path: Path, opening: Opening = open_and_run) -> str:
    said = harmless(attack, source, tmp_path, opening)
    assert said, "it was opened"
    return said


class Touch:
    """Unpickling one writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def structure(change: Callable[[dict[str, Any]], object]) -> Attack:
    """Change ``structure.json`` and make the digests fit again."""

    def attack(folder: Path) -> None:
        document = json.loads((folder / "structure.json").read_text())
        change(document)
        sign_structure(folder, document)

    return attack


def arguments(**values: Any) -> Attack:
    return structure(lambda document: document["model"]["arguments"].update(values))


def model(name: Any, **values: Any) -> Attack:
    return structure(lambda document: document.update(model={"name": name, "arguments": values}))


# --- Opening a network runs no code of its files --------------------------------------------------------


def pickled_weights(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Touch()))
    structure(lambda document: None)(folder)


RUN_CODE: dict[str, Attack] = {
    "weights that are a pickle": pickled_weights,
    "a model that is a function of Python": model("os.system", command="touch touched"),
    "a model in a folder above": model("offload_sparse/../../os.system"),
    "a model of a hub": model("timm/hf_hub:someone/model"),
    "arguments that load a checkpoint": model("timm/resnet18", num_classes=2, checkpoint_path="weights.pth"),
    "arguments that download weights": model("timm/resnet18", num_classes=2, pretrained=True),
    "weights of torchvision": model("torchvision/resnet18", num_classes=2, weights="DEFAULT"),
    "arguments that are objects": arguments(
        width={"class_path": "os.system", "init_args": {"command": "true"}}
    ),
}


@pytest.mark.parametrize("attack", RUN_CODE.values(), ids=RUN_CODE)
def test_opening_a_network_runs_no_code_of_its_files(attack: Attack, exported: Path, tmp_path: Path) -> None:
    refused(attack, exported / "vgg_small", tmp_path)


@pytest.mark.parametrize("place", ["folder", "file", "run"])
def test_a_program_is_not_opened_without_trust(place: str, exported: Path, tmp_path: Path) -> None:
    def attack(folder: Path) -> None:
        if place == "run":
            shutil.copytree(exported / "program", folder / "model")

    opened = {"folder": lambda f: f, "file": lambda f: f / "model.pt2", "run": lambda f: f}[place]
    source = exported / "program"
    said = refused(attack, source, tmp_path, lambda folder: open_artefact(opened(folder)))
    assert "--trust" in said


def test_a_program_is_not_opened_in_the_guise_of_onnx(exported: Path, tmp_path: Path) -> None:
    def attack(folder: Path) -> None:
        (folder / "model.pt2").rename(folder / "model.onnx")
        document = json.loads((folder / "network.json").read_text())
        sign_description(folder, document | {"kind": "onnx", "files": {"model.onnx": ""}})

    refused(attack, exported / "program", tmp_path)


# --- It reads no other files ----------------------------------------------------------------------------


def onnx_attack(change: Callable[[Any], None]) -> Attack:
    """Change the protocol buffer of an ONNX file and make the digests fit again."""

    def attack(folder: Path) -> None:
        import onnx

        content = onnx.load(folder / "model.onnx")
        change(content)
        (folder / "model.onnx").write_bytes(content.SerializeToString())
        sign_description(folder, json.loads((folder / "network.json").read_text()))

    return attack


def refer(tensor: Any, place: str = "../secret") -> None:
    """Let a tensor have its values in another file."""
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place


def sparse_initializer(content: Any) -> None:
    refer(content.graph.sparse_initializer.add().values)


def attribute(content: Any) -> None:
    entry = content.graph.node[0].attribute.add()
    entry.name = "value"
    refer(entry.t)


def attribute_of_a_graph(content: Any) -> None:
    entry = content.graph.node[0].attribute.add()
    entry.name = "body"
    refer(entry.g.initializer.add())


def function(content: Any) -> None:
    refer(content.functions.add().node.add().attribute.add().t)


def linked_file(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere.onnx")


def linked_data(folder: Path) -> None:
    (folder / "model.onnx.data").symlink_to("/etc/passwd")


def unlisted_data(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"0" * 100)


def description(**values: Any) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / "network.json").read_text())
        sign_description(folder, document | values)

    return attack


OTHER_FILES: dict[str, Attack] = {
    "weights elsewhere": onnx_attack(lambda content: refer(content.graph.initializer[0])),
    "weights at an absolute place": onnx_attack(
        lambda content: refer(content.graph.initializer[0], "/etc/passwd")
    ),
    "sparse weights elsewhere": onnx_attack(sparse_initializer),
    "an attribute elsewhere": onnx_attack(attribute),
    "a graph inside of an attribute": onnx_attack(attribute_of_a_graph),
    "a function": onnx_attack(function),
    "the network is a link": linked_file,
    "its data are a link": linked_data,
    "its data are not in the description": unlisted_data,
    "a name that leaves the folder": description(files={"../model.onnx": "0"}),
    "a file of another kind": description(files={"model.pt2": "0"}),
    "operators of others": onnx_attack(
        lambda content: setattr(content.graph.node[0], "domain", "com.microsoft")
    ),
}


@pytest.mark.parametrize("attack", OTHER_FILES.values(), ids=OTHER_FILES)
def test_opening_a_network_reads_no_other_files(attack: Attack, exported: Path, tmp_path: Path) -> None:
    refused(attack, exported / "vgg_small_onnx", tmp_path)


# --- It takes memory in proportion ----------------------------------------------------------------------


def set_shape(name: str, shape: list[int]) -> Attack:
    def attack(folder: Path) -> None:
        def change(header: dict[str, Any]) -> dict[str, Any]:
            header[name]["shape"] = shape
            return header

        change_header(folder / "weights.safetensors", change)
        structure(lambda document: document["tensors"].update({name: shape}))(folder)

    return attack


SWIN = "timm/swin_tiny_patch4_window7_224"
MEMORY: dict[str, tuple[str, Attack]] = {
    "a tensor of 10^18 entries": ("vgg_small", set_shape("features.0.weight", [10**9, 10**9])),
    "a tensor without entries but with 10^18 rows": (
        "vgg_small",
        set_shape("features.0.weight", [10**18, 0]),
    ),
    "10^8 layers": ("vgg_small", model(SWIN, num_classes=2, depths=[HUGE, 2, 2, 2])),
    "10^6 layers": ("vgg_small", model(SWIN, num_classes=2, depths=[10**6, 2, 2, 2])),
    "10^5 layers, each number below": ("vgg_small", model(SWIN, num_classes=2, depths=[10**5] * 4)),
    "windows of 300 pixels": (
        "vgg_small",
        model(SWIN, num_classes=2, window_size=300, img_size=2400),
    ),
    "images of a million pixels a side": (
        "vgg_small",
        model("timm/vit_tiny_patch16_224", img_size=10**6),
    ),
    "layers of a million channels": (
        "vgg_small",
        model("timm/vit_tiny_patch16_224", embed_dim=999_936, num_heads=3),
    ),
    "10^9 classes": ("vgg_small", arguments(num_classes=10**9)),
    "layers for real after an error": (
        "vgg_small",
        model("torchvision/regnet_x_400mf", num_classes=2, stem_width=2_000_000, odd=1),
    ),
    "an addition of 10^12 channels": (
        "resnet20_cifar",
        structure(lambda d: next(iter(d["additions"].values())).update(width=10**12)),
    ),
    "a group of 10^18 channels": (
        "vgg_small",
        structure(lambda d: next(iter(d["groups"].values())).update(size=10**18, kept=[10**18])),
    ),
    "images of 10^12 pixels": (
        "vgg_small",
        structure(lambda d: d["preprocessing"].update(shape=[3, 10**6, 10**6])),
    ),
    "a text of 60 MB": (
        "vgg_small",
        structure(lambda d: d.update(model={"name": "x" * 60_000_000})),
    ),
    "an addition with a name of 100 KB": (
        "resnet20_cifar",
        structure(lambda d: d["additions"].update({"x" * 100_000: {"width": 1, "left": [0], "right": [0]}})),
    ),
    "a key of 60 MB": ("vgg_small", structure(lambda d: d.update({"x" * 60_000_000: 1}))),
    "a text of 100 MB": (
        "vgg_small",
        structure(lambda d: d.update(model={"name": "x" * 100_000_000})),
    ),
    "ten million lists": (
        "vgg_small",
        structure(lambda d: d["model"].update(arguments={"a": [[]] * 10**7})),
    ),
}


@pytest.mark.parametrize(("source", "attack"), MEMORY.values(), ids=MEMORY)
def test_opening_a_network_takes_memory_in_proportion(
    source: str, attack: Attack, exported: Path, tmp_path: Path
) -> None:
    refused(attack, exported / source, tmp_path)


def test_a_network_that_was_wider_than_any_machine_is_opened(exported: Path, tmp_path: Path) -> None:
    """Only what it keeps of the full network takes memory."""
    assert not harmless(arguments(width=10_000.0), exported / "vgg_small", tmp_path)


def expand(content: Any) -> None:
    """Multiply the images by ones [100000, 1, 1, 100000]."""
    from onnx import TensorProto, helper

    graph = content.graph
    graph.initializer.append(helper.make_tensor("big", TensorProto.INT64, [4], [100_000, 1, 1, 100_000]))
    graph.node.append(helper.make_node("ReduceMax", ["images"], ["m"], keepdims=1))
    graph.node.append(helper.make_node("Expand", ["m", "big"], ["e"]))
    graph.node.append(helper.make_node("ReduceMax", ["e"], ["logits_"], keepdims=0))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits_", TensorProto.FLOAT, []))


def loop(content: Any) -> None:
    """Loop 10^12 times."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, [])],
        [info("d", TensorProto.BOOL, [])],
    )
    content.graph.initializer.append(helper.make_tensor("n", TensorProto.INT64, [], [10**12]))
    content.graph.initializer.append(helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    content.graph.node.append(helper.make_node("Loop", ["n", "t"], [], body=body))


GRAPHS: dict[str, Attack] = {
    "a tensor of 40 GB": onnx_attack(expand),
    "a loop of 10^12 steps": onnx_attack(loop),
}


@pytest.mark.parametrize("attack", GRAPHS.values(), ids=GRAPHS)
def test_running_an_onnx_file_ends_and_takes_bounded_memory(
    attack: Attack, exported: Path, tmp_path: Path
) -> None:
    refused(attack, exported / "vgg_small_onnx", tmp_path)


# --- It ends ----------------------------------------------------------------------------------------------


def replaced(name: str, by: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        if by == "fifo":
            os.mkfifo(folder / name)
        elif by == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to(by)

    return attack


@pytest.mark.parametrize("by", ["fifo", "folder", "/dev/zero", "/dev/stdin", "/proc/self/mem"])
@pytest.mark.parametrize("name", ["structure.json", "weights.safetensors"])
def test_only_regular_files_are_read(name: str, by: str, exported: Path, tmp_path: Path) -> None:
    refused(replaced(name, by), exported / "vgg_small", tmp_path)


@pytest.mark.parametrize("by", ["fifo", "folder", "/dev/zero"])
@pytest.mark.parametrize("name", ["network.json", "model.onnx"])
def test_only_regular_files_are_read_beside_a_graph(
    name: str, by: str, exported: Path, tmp_path: Path
) -> None:
    refused(replaced(name, by), exported / "vgg_small_onnx", tmp_path)


# --- It is what it says it is -------------------------------------------------------------------------------


def test_tensors_of_other_types_or_shapes_are_refused(exported: Path, tmp_path: Path) -> None:
    network = load_pruned(exported / "vgg_small")
    name = next(name for name, p in network.named_parameters() if p.dim() == 4)
    for number, change in enumerate(
        (
            lambda t: t.to(torch.int64),
            lambda t: t.to(torch.complex64),
            lambda t: t[:-1].contiguous(),
            lambda t: torch.cat([t] * 100),
            lambda t: t.flatten(1),
            lambda t: t.to(torch.float8_e4m3fn),
        )
    ):

        def attack(folder: Path, change: Callable[[Any], Any] = change) -> None:
            tensors = load_file(folder / "weights.safetensors")
            tensors[name] = change(tensors[name])
            save_file(tensors, folder / "weights.safetensors")
            structure(lambda d: d["tensors"].update({name: list(tensors[name].shape)}))(folder)

        refused(attack, exported / "vgg_small", tmp_path / str(number))
