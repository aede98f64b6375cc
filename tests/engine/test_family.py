"""A family: members are the narrow networks of their masks, trained through the largest of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import meta_copy, narrow_module
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.family import Family, own_entries
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.weight_store import WEIGHTS
from offload_sparse.workloads.models import build_model
from tests.support.ranks import run_ranks
from tests.support.sessions import batches, loss_of, make_session, own_part, small_net, whole

CPU = torch.device("cpu")
RESIDUALS = ("coupled", "internal", "filter")


def family_of(residual: str = "coupled", shares: tuple[float, ...] = (0.2, 0.4, 0.5, 0.8)) -> tuple[Any, ...]:
    """(full network, its map, masks, the largest member, the family)."""
    torch.manual_seed(0)
    full = build_model("offload_sparse/resnet20_cifar", 10, 3, 16, width=0.5).double()
    channel_map = discover(full, (torch.randn(1, 3, 16, 16).double(),), residual)  # type: ignore[arg-type]
    order = torch.rand(channel_map.num_atoms)
    masks: list[Tensor] = []
    for share in shares:
        mask = order < share
        for group in channel_map.groups:
            mask[group.start + int(order[group.start : group.stop].argmin())] = True
        masks.append(mask)
    largest = narrow_module(full, channel_map, masks[-1]).train()
    return full, channel_map, masks, largest, Family(meta_copy(full), channel_map, masks, 0, CPU)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_member_is_the_narrow_network_of_its_mask(residual: str) -> None:
    full, channel_map, masks, largest, family = family_of(residual)
    x = torch.randn(4, 3, 16, 16).double()
    counted = {name: buffer.clone() for name, buffer in largest.named_buffers()}
    for number, mask in enumerate(masks[:-1]):
        alone = narrow_module(full, channel_map, mask).train()
        torch.testing.assert_close(family(number, largest, x), alone(x), rtol=1e-10, atol=1e-10)
        extracted = family.extract(number, largest)
        assert {n: p.shape for n, p in extracted.named_parameters()} == {
            n: p.shape for n, p in alone.named_parameters()
        }
        torch.testing.assert_close(extracted(x), alone(x), rtol=1e-10, atol=1e-10)
    for name, buffer in largest.named_buffers():
        torch.testing.assert_close(buffer, counted[name], rtol=0, atol=0, msg=f"a member has moved {name}")


def test_gradients_of_a_member_reach_what_it_keeps_of_the_largest() -> None:
    full, channel_map, masks, largest, family = family_of()
    x, y = torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    F.cross_entropy(family(0, largest, x), y).backward()
    alone = narrow_module(full, channel_map, masks[0]).train()
    F.cross_entropy(alone(x), y).backward()
    for (name, large), part in zip(largest.named_parameters(), alone.parameters(), strict=True):
        assert large.grad is not None, name
        assert part.grad is not None, name
        assert int((large.grad != 0).sum()) <= part.numel()
        torch.testing.assert_close(large.grad.sum(), part.grad.sum(), rtol=1e-9, atol=1e-12)


def test_a_step_trains_the_largest_the_smallest_and_one_between() -> None:
    *_, family = family_of()
    chosen = [tuple(family.chosen(step)) for step in range(200)]
    assert set(chosen) == {(0, 1), (0, 2)}
    assert 60 < chosen.count((0, 1)) < 140
    assert chosen == [tuple(family.chosen(step)) for step in range(200)]
    *_, of_two = family_of(shares=(0.4, 0.8))
    assert of_two.chosen(3) == [0]


def test_the_loss_is_the_mean_of_what_its_members_lose_by_the_labels() -> None:
    *_, largest, family = family_of()
    x, y = torch.randn(4, 3, 16, 16).double(), torch.arange(4)

    def loss_fn(network: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(network(x), y), {"metric": torch.ones(())}

    loss, metrics = family.loss(loss_fn, largest, family.chosen(5))
    members = [F.cross_entropy(family(n, largest, x), y) for n in family.chosen(5)]
    expected = (F.cross_entropy(largest(x), y) + sum(members)) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert set(metrics) == {"metric"}


def test_members_of_other_networks_narrow_what_theirs_do() -> None:
    """Depthwise convolutions, and groups of blocks: what a map says, and nothing about layers."""
    torch.manual_seed(0)
    full: nn.Module = build_model("timm/mobilenetv1_100", 10, 3, 32).double().eval()
    channel_map = discover(full, (torch.randn(1, 3, 32, 32).double(),), "coupled")
    masks = [channel_map.uniform_mask(share) for share in (0.25, 0.5)]
    largest = narrow_module(full, channel_map, masks[1])
    family = Family(meta_copy(full), channel_map, masks, 0, CPU)
    x = torch.randn(2, 3, 32, 32).double()
    alone = narrow_module(full, channel_map, masks[0])
    torch.testing.assert_close(family(0, largest, x), alone(x), rtol=1e-10, atol=1e-10)


def weights_of_an_instance(steps: int) -> Tensor:
    policy = PolicyConfig(rho=0.3, search="none")
    session = make_session(small_net(), policy, RoundConfig(k=2), members=2)
    for batch in batches(steps):
        session.step(loss_of(own_part(batch)))
    session.settle()
    found = whole(session.store, WEIGHTS)
    assert len(found) == sum(p.numel() for p in small_net().parameters()) + own_entries(session.channel_map)
    session.transfers.close()
    return found


def test_a_network_streamed_from_one_rank_has_own_norms_of_members() -> None:
    """Its values are streamed to the ranks; those that it lacks are 0."""
    alone = weights_of_an_instance(1)
    first, second = run_ranks(2, weights_of_an_instance, 0)
    assert torch.equal(first, second)
    assert int((alone != 0).sum()) > int((first != 0).sum()), "the norms begin with the final mask"
