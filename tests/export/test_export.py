"""A network exported in any format is the network that was trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.stream_add import expose_additions
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.cli.main import main
from offload_sparse.export import convert
from offload_sparse.export.convert import Format, export_network
from offload_sparse.export.description import Kind, Preprocessing, describe
from offload_sparse.export.hub import model_card
from offload_sparse.export.json_values import Count, sealed
from offload_sparse.export.network_file import FinalNetwork, Structure, load_pruned
from offload_sparse.export.open import open_artefact
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.source import load_splits
from offload_sparse.workloads.models import build_model
from tests.support.made_once import made_once
from tests.support.residual_nets import ResidualNet

FORMATS: tuple[Format, ...] = ("safetensors", "torch_export", "onnx", "hub")
SHAPE = (1, 28, 28)
ARGUMENTS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 28}
MODEL: dict[str, Any] = {"name": "offload_sparse/lenet5_caffe", "arguments": ARGUMENTS}
SUMMARY = {
    "test_accuracy": 0.875,
    "params_ratio": 0.0625,
    "steps": 12,
    "dataset": "someone/images",
    "seconds": 3.5,
}


def narrowed(full: nn.Module, shape: tuple[int, ...], residual: Residual = "coupled") -> FinalNetwork:
    channel_map = discover(full, (torch.empty(1, *shape),), residual)
    mask = torch.rand(channel_map.num_atoms) < 0.5
    mask[[group.start for group in channel_map.groups]] = True
    expose_additions(full, channel_map.additions)
    module = narrow_module(full, channel_map, mask).eval()
    return FinalNetwork(module, mask, channel_map, type(full))


@pytest.fixture(scope="module")
def network() -> FinalNetwork:
    torch.manual_seed(0)
    return narrowed(build_model(MODEL["name"], **ARGUMENTS), SHAPE)


@pytest.fixture(scope="module")
def exports(network: FinalNetwork) -> Path:
    """The folder of a run with the network in every format."""
    return made_once("exports", partial(export, network))


def export(network: FinalNetwork, run_dir: Path) -> None:
    classes = list(load_splits(DataConfig()).class_names)
    preprocessing = {"mean": [0.25], "std": [0.5], "shape": list(SHAPE), "class_names": classes}
    network.save(run_dir / "model", MODEL, preprocessing)
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (run_dir / "config.yaml").write_text("data: {limit: 48}\n")
    (run_dir / "metrics.jsonl").touch()
    for name in FORMATS:
        figures = export_network(run_dir, name)
        assert figures["largest_difference"] <= 1e-5


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Callable[[Kind], Path]:
    """A copy of one export, to be damaged."""

    def copied(kind: Kind) -> Path:
        return Path(shutil.copytree(exports / "export" / kind, tmp_path / kind))

    return copied


@torch.no_grad()
def logits(path: Path, images: Tensor) -> Tensor:
    return open_artefact(path, trust=True).network(images)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch", [1, 5])
def test_what_is_read_back_computes_the_same_logits(
    name: Format, batch: int, network: FinalNetwork, exports: Path
) -> None:
    """For batches of any size."""
    images = torch.randn(batch, *SHAPE)
    with torch.no_grad():
        expected = network.module(images)
    torch.testing.assert_close(logits(exports / "export" / name, images), expected, rtol=1e-4, atol=1e-5)


def test_sums_whose_operands_hold_different_channels_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, which becomes ONNX in float32."""
    torch.manual_seed(0)
    network = narrowed(ResidualNet(), (2, 6, 6), "filter")
    assert network.channel_map.additions
    network.module.double()
    network.save(tmp_path / "model", None, {"shape": [2, 6, 6]})
    monkeypatch.setattr(convert, "load_pruned", partial(load_pruned, model=ResidualNet))
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = network.module(images)
    for kind, dtype in (("torch_export", torch.float64), ("onnx", torch.float32)):
        export_network(tmp_path, kind)
        opened = open_artefact(tmp_path / "export" / kind, trust=True)
        assert opened.dtype == dtype
        with torch.no_grad():
            found = opened.network(images.to(dtype))
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-4, atol=1e-5)


def test_evaluate_measures_the_same_on_every_format(
    exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [exports, *(exports / "export" / name for name in FORMATS), exports / "export/onnx/model.onnx"]
    found = []
    for place in places:
        assert main(["evaluate", str(place), "--json", "--trust", "true"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert {figures["images"] for figures in found} == {48}
    assert {figures["accuracy"] for figures in found} == {found[0]["accuracy"]}
    assert [figures["loss"] for figures in found] == pytest.approx([found[0]["loss"]] * len(found), rel=1e-5)


def test_an_export_of_an_earlier_version_without_zeros_is_refused(
    network: FinalNetwork, tmp_path: Path
) -> None:
    network.save(tmp_path, MODEL)
    document = json.loads((tmp_path / "structure.json").read_text()) | {"sparse": ["features.0.weight"]}
    del document["digest"]
    (tmp_path / "structure.json").write_text(sealed(document))
    with pytest.raises(ValueError, match="without their zeros"):
        load_pruned(tmp_path)


# --- the model card ----------------------------------------------------------------------------------


def test_the_model_card_carries_the_figures_of_the_run_and_the_widths(
    network: FinalNetwork, exports: Path
) -> None:
    _, metadata, text = (exports / "export" / "hub" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["datasets"] == ["someone/images"]
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert "| test accuracy | 87.50% |" in text
    for group, widths in network.kept_channels().items():
        assert f"| {group} | {len(widths.kept)} of {widths.size} |" in text


def test_the_model_card_says_of_images_what_is_known() -> None:
    def card(**known: Any) -> str:
        return model_card(Structure(Count(1), {}, Preprocessing(**known), {}, {}), {})

    assert "normalised" not in card(shape=(Count(1), Count(28), Count(28)))
    assert "mean [0.25] and standard deviation [0.5]" in card(mean=(0.25,), std=(0.5,))
    assert "Classes: ant, bee." in card(class_names=("ant", "bee"))


@pytest.mark.parametrize("dataset", ["/home/someone/secret/images", "../images", "images.parquet", "~/x"])
def test_the_model_card_names_no_folder_of_the_machine(dataset: str) -> None:
    structure = Structure(Count(1), MODEL, Preprocessing(), {}, {})
    assert dataset not in model_card(structure, SUMMARY | {"dataset": dataset})


# --- what cannot be written --------------------------------------------------------------------------


def test_a_network_is_never_written_over_itself(exports: Path) -> None:
    with pytest.raises(ValueError, match=r"is the folder that is read; .* --output"):
        export_network(exports, "safetensors", exports / "model")


@pytest.mark.parametrize(
    ("name", "own"), [("safetensors", "structure.json"), ("hub", "README.md"), ("onnx", "network.json")]
)
def test_a_file_that_no_export_has_written_is_not_replaced(
    name: Format, own: str, exports: Path, tmp_path: Path
) -> None:
    (tmp_path / own).write_text("my own")
    with pytest.raises(ValueError, match=f"{own} is of no export that can be replaced; move it, or give"):
        export_network(exports, name, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {own: "my own"}


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    exports: Path, tmp_path: Path, network: FinalNetwork
) -> None:
    own = {name: name.encode() for name in ("model.pt2", "notes.txt")}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    for name in ("safetensors", "onnx", "hub", "safetensors"):
        export_network(exports, name, tmp_path)
        written = {path.name for path in (exports / "export" / name).iterdir()}
        assert {path.name for path in tmp_path.iterdir()} == {*written, *own}
        assert {name: (tmp_path / name).read_bytes() for name in own} == own
        images = torch.randn(2, *SHAPE)
        torch.testing.assert_close(logits(tmp_path, images), network.module(images), rtol=1e-4, atol=1e-5)


def test_an_export_in_the_folder_of_a_run_is_not_taken_for_it(
    exports: Path, tmp_path: Path, network: FinalNetwork
) -> None:
    """Which may have gone on since, as to another network here."""
    run, images = Path(shutil.copytree(exports, tmp_path / "run")), torch.randn(2, *SHAPE)
    export_network(run, "safetensors", run)
    torch.manual_seed(1)
    later = narrowed(build_model(MODEL["name"], **ARGUMENTS), SHAPE)
    later.save(run / "model", MODEL)
    for path, expected in {run: later, run / "weights.safetensors": network}.items():
        torch.testing.assert_close(logits(path, images), expected.module(images), rtol=1e-4, atol=1e-5)


def test_an_export_that_fails_loses_no_earlier_one(
    copy: Callable[[Kind], Path], exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(network: Any, shape: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no such operator")

    earlier = copy("onnx")
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    monkeypatch.setattr(convert, "write_onnx", breaks)
    with pytest.raises(ValueError, match="no such operator"):
        export_network(exports, "onnx", earlier)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_a_graph_needs_the_shape_of_the_images(network: FinalNetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "model", MODEL)
    with pytest.raises(ValueError, match="does not say the shape of its images"):
        export_network(tmp_path, "onnx")
    assert not (tmp_path / "export" / "onnx").exists(), "which would look like an export"


def test_missing_packages_are_told_with_what_to_install(
    exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["evaluate", str(exports / "export" / "onnx")]) == 2
    assert (
        "ONNX needs onnx and onnxruntime; run: pip install 'offload-sparse[onnx]'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["safetensors", "torch_export", "onnx"])
def test_an_export_that_differs_is_an_error_and_cannot_be_read(
    kind: Kind, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path) -> Any:
        network = load_pruned(path)
        next(network.parameters()).data *= 1.1
        return network

    monkeypatch.setattr(convert, "load_pruned", wrong)
    if (
        kind != "safetensors"
    ):  # which is written of the network that was read; what the reader computes is off
        difference = convert._difference
        monkeypatch.setattr(
            convert, "_difference", lambda _, *rest: difference(wrong(exports / "model"), *rest)
        )
        monkeypatch.setattr(convert, "load_pruned", load_pruned)
    with pytest.raises(ValueError, match="do not use it"):
        export_network(exports, kind, tmp_path)
    with pytest.raises(ValueError, match=r"holds no structure\.json"):
        open_artefact(tmp_path, trust=True)


def test_what_is_no_network_is_told_with_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, advice in {
        "missing": "does not exist; give the folder of a run",
        "run": "has not ended yet; give one of the folders in",
        ".": "give the folder `model/` of a finished run",
    }.items():
        for command in ("evaluate", "export"):
            assert main([command, str(tmp_path / path)]) == 2
            assert advice in capsys.readouterr().err


# --- what cannot be read -----------------------------------------------------------------------------


def sign(folder: Path, kind: Kind) -> None:
    """Make the digests fit the files again."""
    describe(folder, kind, {}, Preprocessing(shape=(Count(1), Count(28), Count(28))), "float32")


def refused(folder: Path, trust: bool = False) -> str:
    with pytest.raises(ValueError) as error:
        open_artefact(folder, trust)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_program_is_opened_only_where_it_is_trusted(
    exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = exports / "export" / "torch_export"
    assert "is a program and can run any code; add --trust true" in refused(program)
    for path in (program, program / "model.pt2"):
        assert main(["evaluate", str(path)]) == 2
        assert "add --trust true" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_damaged_files_are_refused_in_one_line(kind: Kind, copy: Callable[[Kind], Path]) -> None:
    folder = copy(kind)
    file = folder / ("model.pt2" if kind == "torch_export" else "model.onnx")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "is missing, damaged, or of another export" in refused(folder)
    file.write_bytes(content[: len(content) // 2])
    sign(folder, kind)
    assert "export the network again" in refused(folder, trust=True)
    file.unlink()
    assert "is missing, damaged, or of another export" in refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "kind": "pickle", "files": {}}',
        '{"format": 1, "kind": "onnx", "files": {"../model.onnx": "0"}}',
        '{"format": 1, "kind": "onnx", "files": {}, "model": {}, "preprocessing": [], "dtype": "float32"}',
        "\udcff",
    ],
)
def test_a_description_that_makes_no_sense_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "network.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "network.json is damaged: " in refused(tmp_path)
