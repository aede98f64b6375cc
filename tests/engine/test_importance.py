"""The importance of atoms is that of the papers, whoever holds the rows; a start by it is a one-shot cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.subnet import output_dimension
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.importance import Importance
from offload_sparse.engine.preparation import prepare
from offload_sparse.engine.probing import _Thinned
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.policy.published_widths import static_mask
from offload_sparse.policy.width_search import WidthSearch
from offload_sparse.policy.widths import of_least_margin
from offload_sparse.store.initialisation import build_seeded, named_tensors
from offload_sparse.store.weight_store import Ranks, WeightStore
from tests.support.channel_maps import SmallNet, small_map
from tests.support.ranks import run_ranks
from tests.support.residual_nets import ResidualNet

KINDS = ("l1", "l2", "norm_scale")


def network() -> SmallNet:
    net = build_seeded(SmallNet, 1)
    assert isinstance(net, SmallNet)
    for norm in (net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, 0.1, 2.0, generator=torch.Generator().manual_seed(2))
    return net


def by_hand(net: SmallNet, kind: str) -> Tensor:
    parts = []
    for conv, norm in ((net.conv1, net.norm1), (net.conv2, net.norm2)):
        filters = conv.weight.detach().double().flatten(1)
        norms = filters.abs().sum(1) if kind == "l1" else filters.square().sum(1).sqrt()
        scale = norm.weight.detach().double() if kind == "norm_scale" else torch.ones(len(norms)).double()
        parts.append(norms / norms.mean() * (scale / scale.mean()))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_and_scales_are_those_of_the_papers(kind: Any) -> None:
    net = network()
    found = Importance.of_tensors(kind, small_map(net), net, named_tensors(net).items(), 0)
    torch.testing.assert_close(found, by_hand(net, kind), rtol=1e-10, atol=0)


def computed(first: nn.Module, second: nn.Module, weights: tuple[Tensor, Tensor]) -> nn.Sequential:
    """tanh(x Aᵀ) Bᵀ by any two layers that have such a product; ``weights`` are A and B."""
    net = nn.Sequential(first, nn.Tanh(), second)
    with torch.no_grad():
        for layer, weight in zip((first, second), weights, strict=True):
            stored = weight if output_dimension(layer) == 0 else weight.T
            layer.get_parameter("weight").copy_(stored.view_as(layer.get_parameter("weight")))
            for name, bias in layer.named_parameters():
                bias.mul_(float(name != "bias"))
    return net.double()


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv2d(6, 8, 1), nn.Conv2d(8, 5, 1)), (6, 1, 1)),
        ((nn.ConvTranspose2d(6, 8, 1), nn.ConvTranspose2d(8, 5, 1)), (6, 1, 1)),
        ((Conv1D(8, 6), Conv1D(5, 8)), (6,)),
        ((nn.Embedding(6, 8), nn.Linear(8, 5)), ()),
    ],
    ids=["conv", "transposed", "conv1d", "embedding"],
)
def test_a_layer_matters_by_what_it_computes_not_by_how_it_lies(
    layers: tuple[nn.Module, nn.Module], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(8, 6, generator=generator), torch.randn(5, 8, generator=generator)
    one_hot, labels, some = torch.eye(6).double(), torch.arange(6) % 5, torch.arange(8) % 4 > 0
    found = []
    for pair, inputs in (
        ((nn.Linear(6, 8), nn.Linear(8, 5)), one_hot),
        (layers, one_hot.view(6, *shape) if shape else torch.arange(6)),
    ):
        net = computed(*pair, weights)
        channel_map = prepare(net, (inputs,), "coupled", verify=False).channel_map
        importance = Importance.of_tensors("l2", channel_map, net, named_tensors(net).items(), 0)
        thinned = _Thinned(net, Selection(channel_map, some | True), torch.full((8,), 1.25))
        with torch.no_grad():
            loss = thinned.loss(some, lambda n, x=inputs: cross_entropy(n(x).flatten(1), labels), Forward())
        found.append((importance, loss))
    torch.testing.assert_close(found[1], found[0])


def test_where_no_norm_scales_a_width_both_sides_count() -> None:
    """A wide unit that nobody reads is as little worth as one that gives nothing."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    prepared = prepare(net, (torch.empty(1, 3),), "coupled", verify=False)
    gives, reads = torch.tensor([1.0, 2, 4, 1]), torch.tensor([1.0, 8, 0, 1])
    with torch.no_grad():
        net[0].weight.copy_(gives[:, None].expand(4, 3))
        net[2].weight.copy_(reads.expand(2, 4))
    found = Importance.of_tensors("l2", prepared.channel_map, net, named_tensors(net).items(), 0)
    torch.testing.assert_close(found, (gives * reads / (2 * 2.5)).double())


def test_the_slopes_of_an_activation_scale_no_channel() -> None:
    linear, both = (nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)) for act in (nn.ReLU(), nn.PReLU(4)))
    with torch.no_grad():
        both[1].weight.copy_(torch.tensor([0.1, 0.9, -0.3, 0.0]))
    both.load_state_dict(linear.state_dict(), strict=False)
    prepared = [prepare(net, (torch.empty(1, 3),), "coupled", verify=False) for net in (linear, both)]
    found = [
        Importance.of_tensors("norm_scale", p.channel_map, net, named_tensors(net).items(), 0)
        for p, net in zip(prepared, (linear, both), strict=True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def of_rows(kind: Any) -> Tensor:
    net, ranks = network(), Ranks.current()
    store = WeightStore(small_map(net), *_names(net), ranks=ranks)
    store.fill(named_tensors(net).items())
    return Importance.of_store(kind, store, net, 0)


def _names(net: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    buffers = tuple(n for n, b in net.named_buffers() if b.is_floating_point())
    return tuple(n for n, _ in net.named_parameters()), buffers


def test_ranks_find_the_importance_of_the_whole() -> None:
    for found in run_ranks(2, of_rows, "norm_scale"):
        torch.testing.assert_close(found, by_hand(network(), "norm_scale"), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(rho=0.5, start="l2"),
        PolicyConfig(rho=0.3, start="l2", budget="flops"),
        PolicyConfig.paper(rho=0.5, start="l2"),
        PolicyConfig(rho=0.5, start="l2", sampler="fixed_width", parametrisation="atom"),
        PolicyConfig(rho=0.5, start="l2", search="none"),
    ],
    ids=["persistent", "flops", "paper", "fixed_width", "none"],
)
def test_the_most_probable_mask_of_a_start_is_the_one_shot_cut(config: PolicyConfig) -> None:
    net = network()
    channel_map, importance = small_map(net), by_hand(network(), "l2")
    cost = CostModel(net, channel_map, (torch.empty(1, 2, 16, 16),))
    kind = WidthSearch if config.search == "none" else MaskPolicy
    policies = [kind(config, channel_map.groups, 0, cost, importance=i) for i in (importance, None)]
    found, even = (policy.candidates(0)[0] for policy in policies)
    assert torch.equal(found, of_least_margin(even, -importance, channel_map.groups))
    assert float(policies[0].s.sum()) == pytest.approx(float(policies[1].s.sum()), rel=0.02)


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_a_cut_of_single_filters_keeps_to_its_budget(budget: Any) -> None:
    """A stream holds what any branch keeps: more, the less alike the best filters of branches are."""
    net = ResidualNet(width=16, hidden=8)
    images = (torch.empty(1, 2, 6, 6),)
    channel_map = discover(net, images, "filter")
    cost = CostModel(net, channel_map, images)
    config = PolicyConfig(rho=0.3, budget=budget, search="none")
    importance = torch.rand(channel_map.num_atoms, generator=torch.Generator().manual_seed(0)).double()
    of_mask, whole = (
        (cost.flops, cost.dense_flops) if budget == "flops" else (cost.parameters, cost.dense_parameters)
    )
    for mask in (
        static_mask("", config, channel_map, cost, -importance),
        WidthSearch(config, channel_map.groups, 0, cost, importance=importance).mask,
    ):
        assert 0.85 * 0.3 * whole < of_mask(mask) <= 0.3 * whole
        assert torch.equal(mask, of_least_margin(mask, -importance, channel_map.groups))
    config = PolicyConfig(rho=0.3, budget=budget, sampler="fixed_width")
    for start in (importance, None):
        policy = MaskPolicy(config, channel_map.groups, 0, cost, start)
        assert all(of_mask(mask) <= 0.3 * whole for mask in policy.candidates(4))


def session_of(
    model: nn.Module | Callable[[], nn.Module], policy: PolicyConfig, weights: Path | None = None
) -> SparseOffload:
    setup = Setup(channel_map=small_map(network()), verify=False)
    example, optimizer = (torch.empty(1, 2, 16, 16),), partial(torch.optim.SGD, lr=0.1)
    return SparseOffload(model, example, optimizer, policy=policy, setup=setup, weights=weights, device="cpu")


def test_a_session_ranks_the_weights_that_it_starts_from() -> None:
    net = network()
    session = session_of(net, PolicyConfig(rho=0.5, start="norm_scale"))
    best, wanted = (
        [set(part.topk(len(part) // 2).indices.tolist()) for part in values.split([6, 8])]
        for values in (session.policy.s, by_hand(net, "norm_scale"))
    )
    assert best == wanted


@pytest.mark.parametrize("trained", [True, False])
def test_only_trained_weights_are_ranked_if_nobody_says(tmp_path: Path, trained: bool) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    weights = tmp_path / "weights.pt" if trained else None
    session = session_of(network, PolicyConfig(rho=0.5, search="none"), weights)
    best = of_least_margin(session.policy.mask, -by_hand(net, "norm_scale"), session.channel_map.groups)
    assert torch.equal(session.policy.mask, best) == trained
