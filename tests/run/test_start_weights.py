"""Runs that start from weights: of a run, a file or a published tag; what cannot be one changes nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from offload_sparse import load_pruned
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.pretrained import WeightSource
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.models import build_model, weight_cache
from offload_sparse.workloads.models.weight_cache import cached_weights
from tests.support import image_runs
from tests.support.image_runs import with_classes

METHODS = ["sparse_offload", "dense", "static", "dfbst", "rigl", "grow_efficient"]


def train(images: Path, run_dir: Path, *more: str) -> int:
    return image_runs.train(images, run_dir, "--train.max_steps", "2", *more)


@pytest.fixture(scope="module")
def dense(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the full network; its images have a mean of their own."""
    run = tmp_path_factory.mktemp("dense") / "run"
    assert train(images, run, "--method", "dense", "--data.mean", "[0.5]", "--data.std", "[0.25]") == 0
    return run


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in ("static", "grow_efficient") else ()) for m in METHODS],
)
def test_every_method_starts_from_the_values(method: str, images: Path, dense: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the entries that are left are those of the start."""
    more = ("--method", method, "--model.weights", str(dense), "--optim.lr", "0")
    assert train(images, tmp_path / "run", *more) == 0
    structure = json.loads((tmp_path / "run" / "model" / "structure.json").read_text())
    kept = structure["groups"].get("features.0", {"kept": slice(None)})["kept"]
    start = load_file(dense / "model" / "weights.safetensors")["features.0.weight"][kept]
    found = load_pruned(tmp_path / "run" / "model").state_dict()["features.0.weight"]
    assert found.shape == start.shape
    assert bool(((found == start) | (found == 0)).all())
    assert bool(found.any())


def test_by_itself_a_run_trains_the_one_shot_cut(
    images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = []
    for method in ("static", "sparse_offload"):
        more = ("--method", method, "--policy.search", "auto", "--quiet", "false")
        assert train(images, tmp_path / method, "--model.weights", str(dense), *more) == 0
        kept.append(json.loads((tmp_path / method / "model" / "structure.json").read_text())["groups"])
    assert kept[0] == kept[1]
    assert "search: none, the cut by norm_scale stays" in capsys.readouterr().err


def test_the_images_are_prepared_as_those_that_the_weights_know(
    images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(images, tmp_path / "as", "--model.weights", str(dense), "--quiet", "false") == 0
    structure = json.loads((tmp_path / "as" / "model" / "structure.json").read_text())
    assert structure["preprocessing"]["mean"] == [0.5]
    assert "mean and std of the images as they were trained on: 0.500 ± 0.250" in capsys.readouterr().err
    more = ("--data.mean", "[0.1]", "--data.std", "[0.1]", "--quiet", "false")
    assert train(images, tmp_path / "own", "--model.weights", str(dense), *more) == 0
    assert "were trained on images of mean and std 0.500 ± 0.250" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--train.distill", "true")], ids=["start", "distill"])
def test_weights_of_other_classes_are_refused(
    more: tuple[str, ...], images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many, so that every tensor has its shape."""
    with_classes(images, tmp_path, "dark", "dusk")
    capsys.readouterr()
    assert train(tmp_path, tmp_path / "run", "--model.weights", str(dense), *more) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "knows the classes dark, light, and the images have dark, dusk; +new_head behind" in message
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_new_head_takes_nothing_of_the_last_layer_of_other_classes(
    images: Path, dense: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 all else is what it was."""
    with_classes(images, tmp_path, "dark", "dusk")
    more = ("--method", "dense", "--model.weights", f"{dense}+new_head", "--optim.lr", "0")
    assert train(tmp_path, tmp_path / "run", *more) == 0
    start, end = (load_file(run / "model" / "weights.safetensors") for run in (dense, tmp_path / "run"))
    names = dict(load_pruned(dense / "model").named_parameters())
    differ = {name for name in names if not torch.equal(start[name], end[name])}
    assert {name.partition(".")[0] for name in differ} == {"classifier"}


def test_a_run_that_started_from_weights_resumes(images: Path, dense: Path, tmp_path: Path) -> None:
    more = ("--model.weights", str(dense), "--checkpoint.every", "1", "--train.max_steps", "2")
    assert train(images, tmp_path / "straight", *more) == 0
    assert image_runs.interrupted(0, images, tmp_path / "parts", *more) == 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert train(images, tmp_path / "parts", *more) == 0
    ends = [load_file(tmp_path / run / "model" / "weights.safetensors") for run in ("straight", "parts")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


REFUSED = {
    "nothing there": (lambda folder: "nowhere", "does not exist"),
    "a damaged file": (lambda folder: write(folder / "w.safetensors", b"{" * 90), "no whole safetensors"),
    "a damaged torch file": (lambda folder: with_a_changed_bit(folder / "w.pt"), "w.pt is damaged"),
    "values that are not finite": (lambda folder: not_finite(folder / "w.pt"), "not finite"),
    "another network": (lambda folder: save(folder / "w.pt"), "does not fit the network: it lacks"),
    "no such thing as published": (lambda folder: "pretrained", "has no published weights"),
}


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def save(path: Path) -> str:
    torch.save({"w": torch.ones(3)}, path)
    return str(path)


def with_a_changed_bit(path: Path) -> str:
    content = bytearray(Path(save(path)).read_bytes())
    content[content.index(torch.ones(3).numpy().tobytes())] ^= 1
    return write(path, bytes(content))


def not_finite(path: Path) -> str:
    network = build_model("offload_sparse/vgg_small", 2, 1, width=0.25)
    torch.nn.init.constant_(next(network.parameters()), torch.inf)
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_start_is_one_line_and_writes_nothing(
    kind: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = REFUSED[kind]
    assert train(images, tmp_path / "run", "--model.weights", make(tmp_path)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("offload-sparse: error: ")
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


# --- published weights ---


def test_a_tag_of_torchvision_is_found_in_the_cache_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"have not been fetched; save https://\S+ as \S+$") as error:
        cached_weights("torchvision/resnet18", "IMAGENET1K_V1")
    path = Path(str(error.value).rpartition(" as ")[2])
    path.parent.mkdir()
    path.touch()
    found = cached_weights("torchvision/resnet18", "IMAGENET1K_V1")
    assert (found.path, found.crop, found.resize, found.interpolation) == (path, 224, 256, "bilinear")
    assert found.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="give one of IMAGENET1K_V1"):
        cached_weights("torchvision/resnet18", "V9")


def test_images_are_prepared_as_networks_do_that_load_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They turn the usual preparation into that of their training."""
    monkeypatch.setattr(weight_cache, "_in_cache_of_torch", lambda name, url: tmp_path)
    pixels = torch.rand(1, 3, 2, 2)
    usual, found = (cached_weights(f"torchvision/{name}") for name in ("resnet18", "googlenet"))
    theirs, ours = (
        (pixels - torch.tensor(each.mean).view(3, 1, 1)) / torch.tensor(each.std).view(3, 1, 1)
        for each in (usual, found)
    )
    with torch.device("meta"):
        network = torchvision.models.GoogLeNet(transform_input=True, aux_logits=False, init_weights=False)
    torch.testing.assert_close(ours, network._transform_input(theirs))
    assert cached_weights("torchvision/inception_v3").mean == found.mean


def test_a_tag_of_timm_is_found_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, tag in (("resnet18.a1_in1k", ""), ("resnet18", "a1_in1k"), ("resnet18.a2_in1k", "a1_in1k")):
        with pytest.raises(ValueError, match=r"hf download timm/resnet18\.a1_in1k model\.safetensors$"):
            cached_weights(f"timm/{name}", tag)
    for name, tag in (("resnet18.nothing", ""), ("resnet18", "nothing")):
        with pytest.raises(ValueError, match=r"no weights 'nothing'; give one of .*a1_in1k"):
            cached_weights(f"timm/{name}", tag)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file: str(tmp_path / file))
    found = cached_weights("timm/resnet18.a1_in1k")
    assert found.path == tmp_path / "model.safetensors"
    assert (found.crop, found.interpolation) == (224, "bicubic")


def test_published_weights_fit_their_network(tmp_path: Path) -> None:
    """Those of a thousand classes a network of ten, with a new head."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    with torch.device("meta"):
        network = build_model("torchvision/resnet18", 10)
    with pytest.raises(ValueError, match="other classes"):
        WeightSource(tmp_path / "w.pth").fitted(network)
    weights = WeightSource(f"{tmp_path / 'w.pth'}+new_head").fitted(network)
    assert network.state_dict().keys() - weights.stored.keys() == {"fc.weight", "fc.bias"}


def test_a_tag_without_its_weights_is_refused() -> None:
    """It would be trained from scratch without a word."""
    with pytest.raises(ValueError, match=r"names published weights.*write timm/resnet18, or set"):
        ModelConfig("timm/resnet18.a1_in1k")
    assert ModelConfig("timm/resnet18.a1_in1k", weights="pretrained").weights


def test_the_difference_from_published_preparation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_sparse.run import start_weights

    known = weight_cache.CachedWeights(Path("w"), (0.5,) * 3, (0.2,) * 3, 224, 232, "bilinear")
    monkeypatch.setattr(start_weights, "cached_weights", lambda name, tag: known)
    config = partial(RunConfig, model=ModelConfig("torchvision/resnet18", weights="pretrained"))
    theirs = start_weights.Preprocessing(known.mean, known.std)
    fitted = start_weights.FittedWeights({}, frozenset(), preprocessing=theirs)
    data, lines = start_weights.prepared_images(config(), fitted, (3, 224, 224))
    assert (data.mean, data.std) == ([0.5] * 3, [0.2] * 3)
    assert "evaluated on 224 pixels of 232 (bilinear), this run on 224 of 224" in lines[-1]
    same = config(data=DataConfig(image_size=224, eval_resize=232))
    assert "evaluated" not in " ".join(start_weights.prepared_images(same, fitted, (3, 224, 224))[1])
