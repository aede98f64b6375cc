"""What must hold between real ranks: gloo groups of two and three processes."""

from __future__ import annotations

import copy
import itertools
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.selection import Selection
from offload_sparse.engine import gradients
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.estimators import paired_losses
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.weight_store import BUFFERS, WEIGHTS, Ranks, WeightStore
from tests.engine.reference import entry_masks
from tests.support.channel_maps import SmallNet, small_map
from tests.support.ranks import run_ranks
from tests.support.sessions import batches, loss_fn, loss_of, make_session, own_part, small_net, whole

POLICY = PolicyConfig.paper(rho=0.5, lr=0.05)


def train_rounds(batch_norm: bool, reference: str) -> dict[str, Any]:
    """Three rounds; the state of the session at their end."""
    rounds = RoundConfig(k=4, reference=reference)  # type: ignore[arg-type]
    session = make_session(small_net(batch_norm), POLICY, rounds, forward=Forward(frozen_batch_norm=True))
    session.check_ranks = True
    for batch in batches(12):
        session.step(loss_of(own_part(batch)))
    session.settle()
    kinds = (WEIGHTS, "momentum_buffer", BUFFERS)
    return {
        "s": session.policy.s,
        "bytes": session.store.nbytes,
        **{k: whole(session.store, k) for k in kinds},
    }


def everything() -> list[dict[str, Any]]:
    schedules = ("every_step", "turns", "round_start")
    return [train_rounds(batch_norm, reference) for batch_norm in (True, False) for reference in schedules]


def test_ranks_agree_with_one_process_on_the_same_global_batch() -> None:
    """Float64, 1e-8 after three rounds, every schedule; BatchNorm normalises with its running statistics."""
    alone = everything()
    ranks = run_ranks(2, everything)
    for result in ranks:
        for expected, found in zip(alone, result, strict=True):
            for kind in ("s", WEIGHTS, "momentum_buffer", BUFFERS):
                torch.testing.assert_close(found[kind], expected[kind], rtol=1e-8, atol=1e-8, msg=kind)
    for expected, *found in zip(alone, *ranks, strict=True):
        assert sum(r["bytes"] for r in found) == expected["bytes"], "every row is stored exactly once"
        assert torch.equal(found[0]["s"], found[1]["s"]), "ranks hold the same bits"


def moved() -> list[list[dict[str, Tensor]]]:
    return [moved_with(reference) for reference in ("every_step", "turns")]


def moved_with(reference: str) -> list[dict[str, Tensor]]:
    """Final state for every way of moving weights and of averaging gradients; BatchNorm per rank."""
    found = []
    for transfer, bucketed in (("full", False), ("delta", True), ("overlap", False)):
        gradients.SENT_BYTES = 1 << 10
        gradients.goes_in_buckets = lambda flat, world_size, use=bucketed: use
        rounds = RoundConfig(k=3, reference=reference, freeze_at=0.7, transfer=transfer)  # type: ignore[arg-type]
        session = make_session(small_net(), POLICY, rounds, total=20)
        for batch in batches(20):
            session.step(loss_of(own_part(batch)))
        session.settle()
        found.append({k: whole(session.store, k) for k in (WEIGHTS, "momentum_buffer", BUFFERS)})
        found[-1]["s"] = session.policy.s
        session.transfers.close()
    return found


def test_every_way_to_move_and_average_gives_the_same_bits() -> None:
    """Two ranks, whichever way moves the weights and averages the gradients."""
    for plain, *others in itertools.chain(*run_ranks(2, moved)):
        for other in others:
            for name, expected in plain.items():
                assert torch.equal(other[name], expected), name


def with_references(subnets: str, transfer: str) -> dict[str, Any]:
    """Three rounds whose s stands still, so that the masks of subnet a do not depend on the references."""
    rounds = RoundConfig(
        k=3,
        reference="every_step",
        subnets=subnets,  # type: ignore[arg-type]
        transfer=transfer,  # type: ignore[arg-type]
    )
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5, lr=0.0), rounds)
    session.check_ranks = True
    for batch in batches(8):
        session.step(loss_of(own_part(batch)))
    second = session.transfers.pair.sides[1]
    values = second.weights.layout.packed(second.arrays[WEIGHTS]).clone()
    found = {"own": values, "mask": second.selection.mask}
    session.settle()
    expected = torch.empty_like(found["own"])
    masks = [torch.empty_like(found["mask"]) for _ in range(2)]
    dist.all_gather(masks, found["mask"])
    for rank, mask in enumerate(masks):  # every rank takes part in every gather
        selection = Selection(session.channel_map, mask)
        out = torch.empty(selection.layout(session.store.partitions[WEIGHTS].layout.shapes).size).double()
        session.store.gather(selection, WEIGHTS, out)
        if rank == dist.get_rank():
            expected = out
    found["right"] = torch.equal(found["own"], expected)
    found |= {k: whole(session.store, k) for k in (WEIGHTS, "momentum_buffer", BUFFERS)}
    session.transfers.close()
    return found


def with_all_references() -> list[dict[str, Any]]:
    ways = ("shared", "delta"), ("references", "delta"), ("references", "overlap")
    return [with_references(*way) for way in ways]


def test_each_rank_may_have_a_reference_of_its_own() -> None:
    """It holds the store's weights for its own mask, and what is trained is the same as with a shared one."""
    shared, *others = zip(*run_ranks(2, with_all_references), strict=True)
    assert torch.equal(shared[0]["mask"], shared[1]["mask"])
    for own in others:
        assert not torch.equal(own[0]["mask"], own[1]["mask"])
        for found in own:
            assert found["right"]
            for kind in (WEIGHTS, "momentum_buffer", BUFFERS):
                assert torch.equal(found[kind], shared[0][kind]), kind


def with_equal_references(transfer: str) -> list[Tensor]:
    """s and weights after rounds in which some ranks, or all, have subnet a as their reference."""
    chosen: dict[str, Any] = {"reference": "every_step", "subnets": "references", "transfer": transfer}
    rounds = RoundConfig(k=2, **chosen)
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5, lr=0.05), rounds)
    session.check_ranks = True
    m, n = session.policy.sample(0)
    drawn = [(m, m, n), (m, n, m), (m, m, m), (m, m, n), (m, n, n), (n, n, m)]
    policy: Any = session.policy
    policy.sample_for_ranks = lambda number, ranks: drawn[number % len(drawn)]
    found = []
    for batch in batches(2 * len(drawn)):
        session.step(loss_of(own_part(batch)))
        session.records()
        found.append(session.policy.s.clone())
    session.settle()
    session.transfers.close()
    return [*found, whole(session.store, WEIGHTS)]


def with_equal_references_of_all_transfers() -> list[list[Tensor]]:
    return [with_equal_references(transfer) for transfer in ("full", "delta", "overlap")]


def test_a_rank_whose_reference_is_the_trained_mask_takes_part() -> None:
    """In the exchange, and in what is learned, as long as that of another rank differs."""
    for one, other in zip(*run_ranks(2, with_equal_references_of_all_transfers), strict=True):
        assert all(map(torch.equal, one, other))
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(one[1:-1:2])]
        assert moved == [True, False, True, True, True], "all are equal in the third round only"


def with_one_mask() -> list[Tensor]:
    """The store's weights after three rounds without a search."""
    found = []
    for subnets in ("references", "shared"):
        rounds = RoundConfig(k=3, reference="every_step", subnets=subnets)  # type: ignore[arg-type]
        session = make_session(small_net(), PolicyConfig(rho=0.5, search="none"), rounds)
        for batch in batches(8):
            session.step(loss_of(own_part(batch)))
        session.settle()
        found.append(whole(session.store, WEIGHTS))
        session.transfers.close()
    return found


def test_a_mask_that_is_not_searched_for_is_the_reference_of_every_rank() -> None:
    for own, shared in run_ranks(2, with_one_mask):
        assert torch.equal(own, shared)


def learned_from_ranks() -> tuple[Tensor, Tensor]:
    """s after one round of one step, and the same by hand from losses of the masked full network."""
    rounds = RoundConfig(k=1, reference="every_step", subnets="references", freeze_at=1.0)
    net = small_net()
    session = make_session(net, PolicyConfig.paper(rho=0.5, lr=0.05), rounds)
    start = session.policy.s.clone()
    batch = own_part(batches(1)[0])
    session.step(loss_of(batch))
    policy = MaskPolicy(PolicyConfig.paper(rho=0.5, lr=0.05), session.channel_map.groups, 3, session.cost)
    masks = policy.sample_for_ranks(0, 2)
    own = [masks[0], masks[1 + dist.get_rank()]]
    measured = torch.stack([masked_loss(net, session.channel_map, mask, batch) for mask in own])
    everyone = [torch.empty_like(measured) for _ in range(2)]
    dist.all_gather(everyone, measured)
    first, second = torch.stack(everyone).T
    policy.update_from_ranks(paired_losses(first, second)[None], torch.stack(masks))
    assert not torch.equal(policy.s, start)
    return session.policy.s, policy.s


def masked_loss(
    net: nn.Module, channel_map: ChannelMap, mask: Tensor, batch: tuple[Tensor, Tensor]
) -> Tensor:
    masked = copy.deepcopy(net).train()
    kept = entry_masks(channel_map, mask)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            parameter.mul_(kept[name])
        return loss_fn(masked, batch)


def test_s_is_learned_from_the_references_of_all_ranks() -> None:
    results = run_ranks(2, learned_from_ranks)
    for found, expected in results:
        # Adam divides by the root of the second moment, so a tiny gradient's rounding shows.
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(results[0][0], results[1][0])


def on_two_nodes() -> list[dict[str, Any]]:
    """Four ranks, two to a node, as far as the launcher's variables say."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return [with_a_store(shard) for shard in ("world", "node")]


def with_a_store(shard: str) -> dict[str, Any]:
    store = StoreConfig(shard=shard)  # type: ignore[arg-type]
    session = make_session(small_net(), POLICY, RoundConfig(k=3), store=store)
    session.check_ranks = True
    for batch in batches(9):
        session.step(loss_of(own_part(batch)))
    session.settle()
    return {
        "rows": session.store.nbytes,
        "world": session.store.ranks.world_size,
        **{k: whole(session.store, k) for k in (WEIGHTS, "momentum_buffer", BUFFERS)},
    }


def test_a_store_per_node_trains_the_same() -> None:
    """The rows of two ranks are a whole store, and no entry comes from the other node; the bits are those of
    a store over all ranks.
    """
    spread, per_node = zip(*run_ranks(4, on_two_nodes), strict=True)
    assert {r["world"] for r in spread} == {4}
    assert {r["world"] for r in per_node} == {2}
    total = sum(r["rows"] for r in spread)
    assert per_node[0]["rows"] + per_node[1]["rows"] == total
    assert per_node[2]["rows"] + per_node[3]["rows"] == total
    for found in per_node:
        for kind in (WEIGHTS, "momentum_buffer", BUFFERS):
            assert torch.equal(found[kind], spread[0][kind]), kind


def spoiled_on_rank_one() -> str:
    session = make_session(small_net(), POLICY, RoundConfig(k=3))
    data = batches(3)
    good: dict[str, Tensor] = {}
    message = ""
    for i, batch in enumerate(data):
        x, y = own_part(batch)
        if i == 2:
            session.settle()
            good = {kind: array.clone() for kind, array in session.store.arrays.items()}
            x = torch.full_like(x, torch.nan) if dist.get_rank() == 1 else x
        try:
            session.step(loss_of((x, y)))
        except FloatingPointError as error:
            message = str(error)
    session.settle()
    # The round ends in settle: statistics, of the good steps, are then the mean over ranks.
    unmoved = all(torch.equal(session.store.arrays[kind], good[kind]) for kind in good.keys() - {BUFFERS})
    return message if unmoved else "the store has changed"


def test_a_loss_not_finite_on_one_rank_stops_all_ranks() -> None:
    """All of them stop before anything moves."""
    for message in run_ranks(2, spoiled_on_rank_one):
        assert "step 2 is not finite on rank 1" in message


def against_ddp() -> float:
    net = small_net()
    parallel = DistributedDataParallel(copy.deepcopy(net).train())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    session = make_session(net, PolicyConfig.paper(rho=1.0), RoundConfig(k=3))
    for batch in batches(8):
        session.step(loss_of(own_part(batch)))
        optimizer.zero_grad()
        loss_fn(parallel, own_part(batch)).backward()
        optimizer.step()
    trained = session.finalize([own_part(batches(1)[0])[0]]).module
    pairs = zip(trained.parameters(), parallel.module.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_rho_one_trains_as_distributed_data_parallel_does() -> None:
    """Invariant 4, with BatchNorm statistics per rank as DDP has them."""
    assert max(run_ranks(2, against_ddp)) < 1e-10


def gather_everything(world_size: int) -> list[Tensor]:
    net = small_net()
    channel_map = small_map(net)
    tensors = {n: t.detach() for n, t in (*net.named_parameters(), *net.named_buffers())}
    names = tuple(n for n, _ in net.named_parameters())
    buffers = tuple(n for n, b in net.named_buffers() if b.is_floating_point())
    ranks = Ranks.current()
    assert ranks.world_size == world_size
    results = []
    for streamed in (False, True):
        store = WeightStore(channel_map, names, buffers, dtype=torch.float64, ranks=ranks)
        if streamed:
            store.fill_from_first_rank(tensors if ranks.rank == 0 else None)
        else:
            store.fill(tensors.items())
        assert store.integer_buffers.keys() == {"norm1.num_batches_tracked", "norm2.num_batches_tracked"}
        for seed in range(3):
            mask = torch.rand(channel_map.num_atoms, generator=torch.Generator().manual_seed(seed)) < 0.6
            mask[[0, 6]] = True
            selection = Selection(channel_map, mask)
            for kind in (WEIGHTS, BUFFERS):
                out = torch.full(
                    (selection.layout(store.partitions[kind].layout.shapes).size,), torch.nan
                ).double()
                store.gather(selection, kind, out)
                expected = [
                    selection.take(n, tensors[n]).flatten() for n in store.partitions[kind].layout.shapes
                ]
                assert torch.equal(out, torch.cat(expected))
                store.scatter(selection, kind, out)
        results.append(whole(store, WEIGHTS))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_subnet_is_assembled_from_all_ranks(world_size: int) -> None:
    """Whichever way the store was filled."""
    expected = gather_everything(1)
    for result in run_ranks(world_size, gather_everything, world_size):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def tampered() -> str:
    session = make_session(small_net(), POLICY, RoundConfig(k=2))
    session.check_ranks = True
    if dist.get_rank() == 1:
        session.policy.s[0] += 1e-12
    try:
        session.step(loss_of(own_part(batches(1)[0])))
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"


def test_a_rank_that_has_drifted_by_one_bit_is_noticed_and_named() -> None:
    for message in run_ranks(2, tampered):
        assert "keep probabilities" in message
        assert "subnet weights" not in message


def test_a_rank_that_hangs_is_killed_and_shows_where() -> None:
    with pytest.raises(RuntimeError, match="Timeout"):
        run_ranks(2, hang, limit=3.0)


def hang() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        dist.recv(torch.empty(1), src=0)


def with_settings_of_their_own() -> list[str]:
    """What a rank is told whose arguments are not those of the other."""
    rank = dist.get_rank()
    policy, rounds = PolicyConfig.paper(rho=0.5), RoundConfig()
    found = []
    for call in (
        partial(make_session, small_net(), PolicyConfig.paper(rho=0.5 - 0.1 * rank), rounds),
        partial(make_session, small_net(), policy, RoundConfig(k=2 + rank)),
        partial(make_session, small_net(), policy, rounds, verify=rank == 0),
        partial(SparseOffload, SmallNet, torch.empty(2, 2, 6, 6), torch.optim.SGD, rho=0.5, seed=rank),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_with_different_settings_are_refused_by_name() -> None:
    first, second = run_ranks(2, with_settings_of_their_own)
    assert first == second
    assert first == [
        "PolicyConfig.rho is 0.5 on rank 0 and 0.4 on rank 1; give every rank the same",
        "RoundConfig.k is 2 on rank 0 and 3 on rank 1; give every rank the same",
        "Setup.verify is True on rank 0 and False on rank 1; give every rank the same",
        "seed is 0 on rank 0 and 1 on rank 1; give every rank the same",
    ]


def flops_by_own_example() -> int:
    """Of a network that takes images of any size."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    example = torch.empty(2, 2, 6 + rank, 6 + rank)
    return SparseOffload(SmallNet, example, torch.optim.SGD, rho=0.5, device="cpu").cost.dense_flops


def test_ranks_count_flops_by_the_example_of_the_first() -> None:
    """Else they would draw other masks, such as behind a loader that pads each batch by itself."""
    assert run_ranks(2, flops_by_own_example) == [flops_by_own_example()] * 2
