"""A search by forward passes alone: losses of both masks, s learned from them, and weights as they were."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offload_sparse.channels.subnet import narrow_module
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.optimizer import OptimizerFactory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store.initialisation import build_seeded, named_tensors
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS
from tests.support.channel_maps import SmallNet, small_map

CONFIG = PolicyConfig(rho=0.5, search="forward", start="l2", lr=0.1)
STEPS, COMPARED, SEARCHED = 20, 8, 16

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network() -> SmallNet:
    net = build_seeded(partial(SmallNet, (12, 16)), 0).double()
    assert isinstance(net, SmallNet)
    return net


def make(
    net: SmallNet, rho: float = 0.5, optimizer: OptimizerFactory = SGD, warmup: int = 0, **settings: Any
) -> SparseOffload:
    return SparseOffload(
        net,
        (torch.empty(1, 2, 16, 16, dtype=torch.float64),),
        optimizer,
        total_steps=STEPS,
        policy=replace(CONFIG, rho=rho),
        rounds=RoundConfig(k=10, freeze_at=SEARCHED / STEPS, **settings),
        setup=Setup(channel_map=small_map(net), verify=False, dtype=torch.float64, local_from=warmup),
        device="cpu",
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    images = [torch.randn(6, 2, 16, 16, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, torch.randint(4, (6,), generator=generator)) for x in images]


def loss_of(network: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = network(batch[0])
    return F.cross_entropy(logits, batch[1]), {"mean": logits.detach().mean()}


@pytest.mark.parametrize("settings", [{"transfer": "full"}, {"reference": "every_step", "prefetch": False}])
def test_pairs_of_forward_passes_move_s_and_no_weight(settings: dict[str, Any]) -> None:
    """Compared with the losses of networks that are cut out by hand, and s learned from these."""
    net = network()
    session, twin = make(net, **settings), make(net, **settings)
    before = {kind: session.store.arrays[kind].clone() for kind in (WEIGHTS, BUFFERS)}
    policy = twin.policy
    assert isinstance(policy, MaskPolicy)
    drawn_ahead = []
    for number, batch in enumerate(batches(COMPARED)):
        ahead = settings.get("prefetch", True) and drawn_ahead
        masks = drawn_ahead.pop() if ahead else policy.sample(number)
        if settings.get("prefetch", True):
            drawn_ahead.append(policy.sample(number + 1))
        losses = [
            loss_of(narrow_module(net, session.channel_map, mask).train(), batch)[0].item() for mask in masks
        ]
        session.step(partial(loss_of, batch=batch))
        (record,) = session.records()
        assert set(record.metrics) == {"mean"}
        if torch.equal(*masks):
            assert record.compared is None, "there is nothing to compare"
        else:
            assert record.compared == pytest.approx(losses, rel=1e-9)
            first, second = record.compared
            policy.update([first], [second], *masks, number)
        torch.testing.assert_close(session.policy.s, policy.s, rtol=0, atol=0)
    session.settle()
    for kind, values in before.items():
        assert torch.equal(session.store.arrays[kind], values), kind
    assert session.forward_flops < COMPARED * 2 * session.cost.dense_flops
    assert not torch.equal(session.policy.s, make(net).policy.s)


@pytest.mark.parametrize("why", ["nothing to search", "frozen on the way"])
def test_a_network_whose_mask_is_final_is_trained(why: str) -> None:
    net = network()
    session = make(net, rho=1.0 if why == "nothing to search" else 0.5)
    before = session.store.arrays[WEIGHTS].clone()
    if why == "frozen on the way":
        session.freeze()
    session.step(partial(loss_of, batch=batches(1)[0]))
    session.settle()
    assert session.frozen
    assert not torch.equal(session.store.arrays[WEIGHTS], before)


def test_ranks_talk_at_every_step_of_a_warm_up_behind_comparisons() -> None:
    net = network()
    roles = make(net, warmup=3, sync="round", reference="round_start").roles
    assert [roles.local(step) for step in (0, COMPARED, COMPARED + 2, COMPARED + 3)] == [False] * 3 + [True]


def test_an_optimizer_counts_the_steps_that_it_has_made() -> None:
    """Adam's first step is the learning rate, however many pairs were compared before."""
    net = network()
    session = make(net, optimizer=partial(torch.optim.Adam, lr=1e-3, eps=0))
    before = session.store.arrays[WEIGHTS].clone()
    for batch in batches(COMPARED + 1):
        session.step(partial(loss_of, batch=batch))
    session.settle()
    moved = (session.store.arrays[WEIGHTS] - before).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-6)


def test_training_follows_and_newcomers_have_their_first_values() -> None:
    net = network()
    session = make(net)
    trained = torch.zeros(session.channel_map.num_atoms, dtype=torch.bool)
    for number, batch in enumerate(batches(STEPS)):
        session.step(partial(loss_of, batch=batch))
        if number >= COMPARED:
            for mask in session.masks or ():
                trained |= mask
    assert session.frozen
    assert int((~trained[:12]).sum()) > 0
    session.settle()
    first, now = named_tensors(net)["conv1.weight"], session.store.own_rows("conv1.weight")
    assert torch.equal(now[~trained[:12]], first[~trained[:12]])
    assert not torch.equal(now[trained[:12]], first[trained[:12]])
    assert session.finalize().mask.sum() == 14
