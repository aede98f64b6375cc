"""Training starts from weights in files: the store holds their bits, on any number of ranks."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.engine.distributed import rank_and_world_size
from offload_sparse.engine.preparation import prepare
from offload_sparse.engine.pretrained import NEW_HEAD, WeightSource
from offload_sparse.engine.session import SparseOffload
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.store.initialisation import build_seeded, named_tensors
from offload_sparse.store.weight_store import Ranks, WeightStore
from tests.support.channel_maps import SmallNet, small_map
from tests.support.ranks import run_ranks

INPUTS = (torch.empty(1, 2, 16, 16, device="meta"),)


def trained(seed: int = 3, **widths: Any) -> SmallNet:
    """A network whose running statistics are not those of the start, either."""
    net = build_seeded(partial(SmallNet, **widths), seed)
    assert isinstance(net, SmallNet)
    net.norm1.running_mean.uniform_(generator=torch.Generator().manual_seed(seed))
    net.norm1.num_batches_tracked.fill_(17)
    return net


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_read_their_own_rows_and_no_more(world_size: int, tmp_path: Path) -> None:
    net = trained()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    prepared = prepare(SmallNet, INPUTS, "coupled", verify=False)
    weights = WeightSource(tmp_path).fitted(prepared.meta_model)
    found: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        store = WeightStore(prepared.channel_map, *prepared.tensor_names(), ranks=Ranks(rank, world_size))
        integers = sum(t.nbytes for t in net.state_dict().values() if not t.is_floating_point())
        assert weights.fill(store) == store.nbytes + integers
        for name in prepared.channel_map.shapes:
            found.setdefault(name, []).append(store.own_rows(name))
        assert int(store.integer_buffers["norm1.num_batches_tracked"]) == 17
    for name, value in named_tensors(net).items():
        if value.is_floating_point():
            assert torch.equal(torch.cat(found[name]).view(value.shape), value), name


def test_a_rank_with_a_weight_that_is_not_finite_stops_all(tmp_path: Path) -> None:
    """A buffer may be infinite: masks of attention are."""
    net = trained()
    net.norm1.running_var.fill_(torch.inf)
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert run_ranks(2, _refusal, str(tmp_path)) == [
        f"head.weight in {tmp_path / 'w.safetensors'} holds values that are not finite; take an earlier "
        "checkpoint of its training"
    ] * 2
    with pytest.raises(ValueError, match="not finite"):
        WeightSource(tmp_path).fitted(SmallNet()).into(SmallNet())


def _refusal(folder: str) -> str:
    prepared = prepare(SmallNet, INPUTS, "coupled", verify=False)
    store = WeightStore(prepared.channel_map, *prepared.tensor_names(), ranks=Ranks.current())
    with pytest.raises(ValueError, match="finite") as error:
        WeightSource(folder).fitted(prepared.meta_model).fill(store)
    return str(error.value)


def test_a_session_starts_from_a_path(tmp_path: Path) -> None:
    net = trained()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    session = SparseOffload(
        SmallNet, INPUTS, partial(torch.optim.SGD, lr=0.1), rho=0.5, weights=tmp_path / "w.pt", device="cpu"
    )
    assert torch.equal(session.store.own_rows("conv2.weight"), net.conv2.weight)
    assert torch.equal(session.store.own_rows("norm1.running_mean"), net.norm1.running_mean)


@pytest.mark.parametrize("table", [None, torch.full((3,), 9.0), torch.full((5,), 9.0)])
def test_what_no_state_dict_has_keeps_the_values_of_the_constructor(
    table: Tensor | None, tmp_path: Path
) -> None:
    """Whatever a file has of it, as those of earlier versions of a network do."""

    class WithTable(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    net = trained()
    kept = {name: t for name, t in net.state_dict().items() if "num_batches" not in name}
    save_file(kept | ({} if table is None else {"table": table}), tmp_path / "w.safetensors")
    prepared = prepare(WithTable, INPUTS, "coupled", verify=False)
    store = WeightStore(prepared.channel_map, *prepared.tensor_names())
    prepared.fill(store, 0, WeightSource(tmp_path).fitted(prepared.meta_model))
    assert store.own_rows("table").tolist() == [0, 1, 2]
    assert int(store.integer_buffers["norm1.num_batches_tracked"]) == 0
    assert torch.equal(store.own_rows("conv1.weight"), net.conv1.weight)


def test_counters_may_have_been_cast_with_the_weights(tmp_path: Path) -> None:
    net = trained()
    torch.save({name: t.half() for name, t in net.state_dict().items()}, tmp_path / "w.pt")
    prepared = prepare(SmallNet, INPUTS, "coupled", verify=False)
    store = WeightStore(prepared.channel_map, *prepared.tensor_names())
    prepared.fill(store, 0, WeightSource(tmp_path).fitted(prepared.meta_model))
    assert torch.equal(store.own_rows("conv1.weight"), net.conv1.weight.half().float())
    assert torch.equal(store.integer_buffers["norm1.num_batches_tracked"], torch.tensor(17))


def test_a_buffer_of_two_modules_is_known_by_both_names(tmp_path: Path) -> None:
    """One of more bits than the weights keeps them, whatever the type in the file."""

    class Shared(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            table = torch.zeros(3, dtype=torch.float64)
            self.norm1.register_buffer("table", table)
            self.norm2.register_buffer("table", table)

    state = Shared().state_dict()
    tables = dict.fromkeys(("norm1.table", "norm2.table"), torch.arange(3.0))
    save_file(state | {name: table.clone() for name, table in tables.items()}, tmp_path / "w.safetensors")
    prepared = prepare(Shared, INPUTS, "coupled", verify=False)
    weights = WeightSource(tmp_path).fitted(prepared.meta_model)
    assert not [line for line in weights.lines if "unknown" in line]
    store = WeightStore(prepared.channel_map, *prepared.tensor_names())
    prepared.fill(store, 0, weights)
    assert {name for name in store.integer_buffers if "table" in name} == {"norm1.table"}
    assert torch.equal(store.integer_buffers["norm1.table"], torch.arange(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "prefix", ["module.", "network.", "module.model.", "net._orig_mod.", "_orig_mod.module.", "backbone."]
)
def test_prefixes_of_wrappers_are_taken_off_and_told(prefix: str, tmp_path: Path) -> None:
    save_file({prefix + n: t for n, t in trained().state_dict().items()}, tmp_path / "w.safetensors")
    weights = WeightSource(tmp_path).fitted(SmallNet())
    assert "conv1.weight" in weights.stored
    assert any(repr(prefix) in line for line in weights.lines)


def test_the_published_weights_of_densenets_have_other_names(tmp_path: Path) -> None:
    net = torchvision.models.DenseNet(4, (2, 1, 1, 1), 8, 1, num_classes=3)
    old = r"(.*denselayer\d+\.(?:norm|conv))([12]\..*)"
    state = {re.sub(old, r"\1.\2", name): t for name, t in net.state_dict().items()}
    assert "features.denseblock1.denselayer2.norm.1.weight" in state
    torch.save(state, tmp_path / "w.pth")
    assert WeightSource(tmp_path).fitted(net).stored.keys() == named_tensors(net).keys()


def test_tied_weights_are_found_under_either_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    value = torch.randn(4, 4)
    for names in (["a.weight"], ["b.weight"], ["a.weight", "b.weight"]):
        save_file({name: value.clone() for name in names}, tmp_path / "w.safetensors")
        net = Tied()
        WeightSource(tmp_path).fitted(net).into(net)
        assert torch.equal(net.a.weight, value)
        assert net.b.weight is net.a.weight


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    state = trained().state_dict() | {n.replace("__", "."): t for n, t in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


FAULTS = {
    "missing": (changed(conv2__weight=None), r"lacks 1 \(conv2\.weight\) of 13 tensors$"),
    "misshapen": (
        changed(conv1__weight=torch.ones(6, 2, 5, 5)),
        r"has 1 \(conv1.weight\) of other shapes \(conv1.weight: \[6, 2, 5, 5\] instead of \[6, 2, 3, 3\]\)$",
    ),
    "integers": (
        changed(conv1__bias=torch.ones(6, dtype=torch.int64)),
        r"has 1 \(conv1\.bias\) of other types \(conv1.bias: torch.int64 instead of torch.float32\)$",
    ),
    "other classes": (
        changed(head__weight=torch.ones(9, 32), head__bias=torch.ones(9)),
        r"has 2 \(head\.bias, head\.weight\).*other classes\? \+new_head behind the path",
    ),
    "another network": (
        {"features.0.weight": torch.ones(3)},
        r"lacks 13 \(.*\) of 13 tensors, and has 1 \(features\.0\.weight\) that the network lacks$",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_does_not_fit_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    state, words = FAULTS[kind]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        WeightSource(tmp_path).fitted(SmallNet())
    assert "\n" not in str(error.value)


def test_unknown_tensors_beside_are_told_and_left(tmp_path: Path) -> None:
    save_file(changed(aux__weight=torch.ones(3)), tmp_path / "w.safetensors")
    weights = WeightSource(tmp_path).fitted(SmallNet())
    assert any("unknown to the network: 1 (aux.weight)" in line for line in weights.lines)


@pytest.mark.parametrize("classes", [9, 4])
def test_a_new_head_starts_afresh_and_all_else_is_read(classes: int, tmp_path: Path) -> None:
    """Where it has as many classes as the old one, too."""
    other = trained(classes=classes)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    net, fresh = build_seeded(SmallNet, 5), build_seeded(SmallNet, 5)
    weights = WeightSource(f"{tmp_path}{NEW_HEAD}").fitted(net)
    weights.into(net)
    assert isinstance(net, SmallNet)
    assert isinstance(fresh, SmallNet)
    assert torch.equal(net.head.weight, fresh.head.weight)
    assert torch.equal(net.conv2.weight, other.conv2.weight)
    assert any("head.weight" in line for line in weights.lines)


def test_a_backbone_without_a_head_is_a_start_for_a_new_one(tmp_path: Path) -> None:
    save_file(changed(head__weight=None, head__bias=None), tmp_path / "w.safetensors")
    weights = WeightSource(f"{tmp_path}{NEW_HEAD}").fitted(SmallNet())
    assert len(weights.stored) == len(trained().state_dict()) - 2
    with pytest.raises(ValueError, match=r"lacks 2 \(head\.weight, head\.bias\)"):
        WeightSource(tmp_path).fitted(SmallNet())


def test_a_new_head_is_no_excuse_for_other_tensors(tmp_path: Path) -> None:
    save_file(trained(widths=(6, 10), classes=9).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="of other shapes"):
        WeightSource(f"{tmp_path}{NEW_HEAD}").fitted(SmallNet())


# --- runs and exports ---


def exported(folder: Path, channel_map: ChannelMap, mask: Tensor, net: nn.Module) -> Path:
    FinalNetwork(net.eval(), mask, channel_map).save(folder / "model", None, {"mean": [0.5], "std": [0.2]})
    return folder


def test_a_full_network_that_a_run_has_left_is_a_start(tmp_path: Path) -> None:
    net = trained()
    run = exported(tmp_path, small_map(net), small_map(net).full_mask(), net)
    for path in (run, run / "model"):
        weights = WeightSource(path).fitted(SmallNet())
        assert len(weights.stored) == len(net.state_dict())
        assert weights.preprocessing.mean == (0.5,)


@pytest.mark.parametrize("kind", ["export of other values", "file of other shapes"])
def test_machines_whose_weights_differ_are_told(kind: str, tmp_path: Path) -> None:
    """A rank would read its rows of another network, or be gone while the others wait."""
    for number, net in enumerate((trained(), trained(4) if "export" in kind else trained(widths=(4, 8)))):
        folder = tmp_path / str(number)
        if "export" in kind:
            exported(folder, small_map(net), small_map(net).full_mask(), net)
        else:
            folder.mkdir()
            save_file(net.state_dict(), folder / "w.safetensors")
    pattern = r"the digest of the weights is (\w+) on rank 0 and (?!\1)\w+ on rank 1; give every machine "
    for told in run_ranks(2, _refusal_of_own, str(tmp_path)):
        assert re.match(pattern, told)


def _refusal_of_own(folder: str) -> str:
    with pytest.raises(ValueError, match="every machine") as error:
        WeightSource(Path(folder) / str(rank_and_world_size()[0]))
    return str(error.value)


def test_a_narrow_network_is_refused_by_its_widths(tmp_path: Path) -> None:
    net = trained()
    mask = small_map(net).full_mask()
    mask[:2] = False
    run = exported(tmp_path, small_map(net), mask, net)
    with pytest.raises(ValueError, match=r"narrow network \(4 of 6 channels of ") as error:
        WeightSource(run)
    assert "\n" not in str(error.value)


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    net = trained()
    run = exported(tmp_path, small_map(net), small_map(net).full_mask(), net)
    file = run / "model" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged"):
        WeightSource(run)


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has not ended"):
        WeightSource(tmp_path)
