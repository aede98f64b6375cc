"""What was trained is what is read back, or saving it is an error."""

from __future__ import annotations

import importlib
import os
import pickle
import stat
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.swin_transformer import SwinTransformer

from offload_sparse import FinalNetwork, Setup, SparseOffload, load_pruned
from offload_sparse.channels.subnet import other_tensors
from offload_sparse.export import convert, network_file, read_back
from offload_sparse.export.convert import export_network
from offload_sparse.export.network_file import tensors_of
from offload_sparse.workloads.models import build_model
from tests.support import awkward_networks, fork_server
from tests.support.awkward_networks import MeanBuffer, Plain, Rates, Residual

IMAGES = (torch.zeros(2, 3, 16, 16),)


def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(tree_leaves(network(images))[0], labels)


def trained(model: Any, images: tuple[Tensor, ...] = IMAGES, steps: int = 3, **more: Any) -> FinalNetwork:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    session = SparseOffload(model, images, optimizer, rho=0.5, total_steps=steps, setup=Setup(**more))
    for _ in range(steps):
        batch = torch.randn(8, *images[0].shape[1:]), torch.randint(0, 4, (8,))
        session.step(lambda network, batch=batch: loss(network, *batch))
    return session.finalize()


def same(network: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        pairs = zip(tree_leaves(network(images)), tree_leaves(other(images)), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("model", awkward_networks.ALL, ids=lambda model: model.__name__)
def test_a_network_that_is_trained_is_saved_and_read_back(model: type[nn.Module], tmp_path: Path) -> None:
    """Whatever ``state_dict`` leaves out and however the constructor works."""
    final = trained(model, residual="filter" if model is Residual else "coupled")
    final.save(tmp_path)
    random_state = torch.get_rng_state()
    loaded = load_pruned(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), random_state), "reading draws no random numbers"
    assert same(loaded, final.module, torch.randn(2, 3, 16, 16))
    found, expected = tensors_of(loaded), tensors_of(final.module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].requires_grad == tensor.requires_grad
    assert not any(tensor.is_meta for tensor in (*found.values(), *other_tensors(loaded)))


def test_the_mean_of_the_images_is_what_it_was(tmp_path: Path) -> None:
    """Case nonpersistent_buffer."""
    trained(MeanBuffer).save(tmp_path)
    mean = load_pruned(tmp_path, MeanBuffer).mean
    assert torch.equal(mean, torch.full((1, 3, 1, 1), 0.5))  # type: ignore[arg-type]


def test_the_rates_of_a_constructor_are_what_they_were(tmp_path: Path) -> None:
    """Case item_in_constructor."""
    trained(Rates).save(tmp_path)
    assert load_pruned(tmp_path, Rates).rates == pytest.approx([0.5, 2 / 3, 5 / 6, 1.0])  # type: ignore[arg-type]


SWIN = {"num_classes": 4, "in_channels": 3, "image_size": 28, "img_size": 28}
SMALL = {"patch_size": 2, "window_size": 7, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4)}


def test_a_swin_transformer_of_timm_is_read_back_by_name(tmp_path: Path) -> None:
    """Case nonpersistent_buffer: its index of relative positions is no part of ``state_dict``."""
    model = {"name": "timm/swin_tiny_patch4_window7_224", "arguments": SWIN | SMALL}
    build = partial(build_model, model["name"], **model["arguments"])  # type: ignore[arg-type]
    final = trained(build, (torch.empty(1, 3, 28, 28, device="meta"),), 1, residual="internal")
    final.save(tmp_path, model, {"shape": [3, 28, 28]})
    loaded = load_pruned(tmp_path)
    images = torch.randn(2, 3, 28, 28)
    assert same(loaded, final.module, images)
    assert not loaded(images).isnan().any()
    index = tensors_of(loaded)["layers.0.blocks.0.attn.relative_position_index"]
    assert index.shape == (49, 49)
    assert (int(index.min()), int(index.max()), int(index[0, 0])) == (0, 168, 84)


class Written(Plain):
    """Counts channels in the code of the network itself."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.c1(images).relu(), 1).view(-1, 16))


@pytest.mark.parametrize(
    "build", [partial(SwinTransformer, [4, 4], 24, [2, 1], [2, 4], [7, 7], num_classes=4), Written]
)
def test_a_network_whose_code_writes_sizes_becomes_a_program(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case swin_torch_export."""
    images = (torch.empty(1, 3, 32, 32, device="meta"),)
    final = trained(build, images, 1, residual="internal", verify=False)
    final.save(tmp_path / "model", None, {"shape": [3, 32, 32], "mean": [0.0] * 3, "std": [1.0] * 3})
    monkeypatch.setattr(convert, "load_pruned", partial(load_pruned, model=build))
    assert export_network(tmp_path / "model", "torch_export")["largest_difference"] <= 1e-4


def test_a_final_network_can_be_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case pickle_filter: read in another process."""
    finals = [trained(Residual, residual=residual) for residual in ("coupled", "filter")]
    torch.save([final.module for final in finals], tmp_path / "networks.pt")
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    monkeypatch.chdir(tmp_path)
    done = fork_server.shared().run(f"{awkward_networks.__name__}:computed_of_a_pickle", [], os.environ, 120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        for final, logits in zip(finals, torch.load(tmp_path / "logits.pt"), strict=True):
            assert torch.equal(logits, final.module(images))


# --- a difference is an error --------------------------------------------------------------------------


class Settings:
    """Global state, which a fresh process does not have."""

    scale = 1.0


class Global(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * Settings.scale


def test_what_only_this_process_knows_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = trained(Global)
    final.save(tmp_path)
    monkeypatch.setattr(Settings, "scale", 1.5)
    with pytest.raises(ValueError, match=r"what was read back from .* differs by 3\.3e-01; do not use it"):
        final.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds no structure\.json"):
        load_pruned(tmp_path, Global)


@pytest.mark.parametrize("folder", ["one", "two"])
def test_the_folder_may_be_relative(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is started once, and follows to wherever the program has gone since."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    trained(Plain).save(Path("network"))
    assert (tmp_path / folder / "network" / "structure.json").exists()


def test_the_network_may_lie_in_a_folder_added_to_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a script does, from which Python imports what lies beside it."""
    (tmp_path / "beside_the_script.py").write_text(
        "from tests.support.awkward_networks import Plain\n\n\nclass Own(Plain):\n    pass\n"
    )
    trained(Plain).save(tmp_path / "before")  # the reader runs
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    own = importlib.import_module("beside_the_script").Own
    trained(own).save(tmp_path / "own")


@pytest.mark.parametrize("by_name", [False, True])
def test_files_that_hold_other_weights_are_found_out(
    by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"num_classes": 4, "in_channels": 3, "image_size": 16, "width": 0.25}
    final = trained(partial(build_model, "offload_sparse/vgg_small", **arguments))
    blocks_of = network_file.blocks_of

    def wrong(tensors: dict[str, Tensor]) -> Any:
        name = next(name for name in tensors if name.endswith("weight"))
        return blocks_of(tensors | {name: tensors[name] * 1.1})

    monkeypatch.setattr(network_file, "blocks_of", wrong)
    model = {"name": "offload_sparse/vgg_small", "arguments": arguments} if by_name else None
    with pytest.raises(ValueError, match="do not use it"):
        final.save(tmp_path, model, {"shape": [3, 16, 16]})


def test_a_network_that_only_this_process_can_build_is_read_here(tmp_path: Path) -> None:
    class Local(Plain):
        pass

    factory = lambda: Local()  # noqa: E731
    trained(factory).save(tmp_path)
    other = trained(factory)
    module = other.module
    broken = FinalNetwork(module, other.mask, other.channel_map, lambda: nn.Sequential(Local()), IMAGES)
    with pytest.raises(ValueError, match=r"cannot be read back: .* was it exported from another model"):
        broken.save(tmp_path)


def test_a_constructor_whose_results_change_is_found_out(tmp_path: Path) -> None:
    final = trained(Plain)
    odd = FinalNetwork(final.module, final.mask, final.channel_map, Residual, IMAGES)
    with pytest.raises(ValueError, match=r"the network has 'c2\.weight', the file does not"):
        odd.save(tmp_path)


def test_a_reader_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reading process died"):
        read_back.compare(partial(os._exit, 1), nn.Identity(), [IMAGES], tmp_path)
    assert read_back.compare(nn.Identity, nn.Identity(), [IMAGES], tmp_path) == 0


def test_one_reader_serves_this_process_and_its_forks(tmp_path: Path) -> None:
    read_back.compare(nn.Identity, nn.Identity(), [IMAGES], tmp_path)
    server = read_back._server
    child = os.fork()
    if child == 0:
        found = read_back.compare(nn.Identity, nn.Identity(), [IMAGES], tmp_path)
        os._exit(int(found != 0 or read_back._server is not server))
    assert os.waitpid(child, 0)[1] == 0
    assert read_back._server is server


def test_differences_are_relative_and_nan_is_only_like_nan() -> None:
    nan, inf = float("nan"), float("inf")
    one = [torch.tensor([1.0, 100.0, nan, inf])]
    assert read_back._difference(one, [torch.tensor([1.0, 101.0, nan, inf])]) == pytest.approx(0.01)
    assert read_back._difference(one, [torch.tensor([nan, 100.0, nan, inf])]) > 1
    assert read_back._difference(one, [torch.tensor([1.0, 100.0, 1.0, inf])]) > 1
    assert read_back._difference(one, [torch.tensor([1.0, 100.0, nan])]) == inf


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_exported_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    final = trained(Plain)
    before = os.umask(umask)
    try:
        final.save(tmp_path / "network")
    finally:
        os.umask(before)
    files = list((tmp_path / "network").iterdir())
    assert {file.name for file in files} == {"weights.safetensors", "structure.json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_a_question_that_names_a_script_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_back._pickled(Plain) is not None
    monkeypatch.setattr(Plain, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Plain", Plain, raising=False)
    assert pickle.dumps(Plain)
    assert read_back._pickled(Plain) is None


def test_the_name_of_the_temporary_folder_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces, and more letters than the address of a socket has room for."""
    folder = tmp_path / ("a folder of a job " * 6)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(read_back, "_server", None)
    assert read_back.compare(nn.Identity, nn.Identity(), [IMAGES], tmp_path) == 0
    process, address = read_back._server or (None, "")
    assert process is not None
    assert Path(address).exists()
    process.stdin.close()
    assert process.wait() == 0
    assert not Path(address).parent.exists(), "nothing is left behind"
