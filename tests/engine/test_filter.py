"""Masks of single filters through the engine: sessions, controls and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from offload_sparse import load_pruned
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.stream_add import additions, expose_additions
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.methods.controls import narrow_initialised
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.initialisation import named_tensors
from offload_sparse.store.weight_store import WEIGHTS
from tests.engine.reference import MaskedTrainer
from tests.support.residual_nets import ResidualNet
from tests.support.sessions import OPTIM, batches, loss_of

IMAGES = (torch.empty(2, 2, 6, 6, device="meta", dtype=torch.float64),)


def make_session(
    net: nn.Module, policy: PolicyConfig, rounds: RoundConfig, total: int = 10**6
) -> SparseOffload:
    return SparseOffload(
        net,
        IMAGES,
        optimizer_factory(OPTIM),
        total_steps=total,
        policy=policy,
        rounds=rounds,
        setup=Setup(residual="filter", dtype=torch.float64),
        seed=3,
        device="cpu",
    )


def residual_net() -> ResidualNet:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return ResidualNet().double()


@pytest.mark.parametrize(("reference", "k"), [("every_step", 1), ("turns", 4), ("round_start", 3)])
def test_training_equals_masked_training_of_the_full_weights(reference: str, k: int) -> None:
    policy = PolicyConfig.paper(rho=0.5, lr=0.05)
    rounds = RoundConfig(k=k, reference=reference, freeze_at=1.0)  # type: ignore[arg-type]
    net = residual_net()
    session = make_session(net, policy, rounds)
    expected = MaskedTrainer(net, session.channel_map, policy, rounds, OPTIM, seed=3)
    data = batches(3 * k)
    for batch in data:
        session.step(loss_of(batch))
    expected.run(data)
    assert any(add.width for _, add in additions(session.transfers.pair.sides[0].module)), (
        "some operands must differ"
    )
    session.settle()
    for kind, tensors in [
        (WEIGHTS, expected.weights),
        ("momentum_buffer", expected.momentum),
        ("buffers", expected.buffers),
    ]:
        for name, value in tensors.items():
            found = session.store.own_rows(name, kind)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11, msg=f"{kind} {name}")
    torch.testing.assert_close(session.policy.s, expected.policy.s, rtol=1e-9, atol=1e-11)


def test_the_final_network_is_exported_and_comes_back(tmp_path: Path) -> None:
    net = residual_net()
    session = make_session(net, PolicyConfig.paper(rho=0.5), RoundConfig(k=2), total=8)
    data = batches(8)
    for batch in data:
        session.step(loss_of(batch))
    final = session.finalize([x for x, _ in data[:2]])
    assert final.module.state_dict().keys() == net.state_dict().keys()
    final.save(tmp_path)
    loaded = load_pruned(tmp_path, model=ResidualNet)
    assert torch.equal(loaded(data[0][0]), final.module(data[0][0]))
    widths = {n: a.width for n, a in additions(final.module)}
    assert {n: a.width for n, a in additions(loaded)} == widths
    assert any(widths.values())


def test_an_export_whose_additions_are_damaged_is_refused(tmp_path: Path) -> None:
    net = residual_net()
    channel_map = discover(net, IMAGES, residual="filter")
    mask = channel_map.full_mask()
    mask[[0, 1, 9]] = False
    FinalNetwork(narrow_module(net, channel_map, mask), mask, channel_map).save(tmp_path)
    structure = json.loads((tmp_path / "structure.json").read_text())
    assert set(structure["additions"]) == set(channel_map.additions)
    structure["additions"]["blocks.0.stream_add_0"]["left"] = [99]
    del structure["digest"], structure["weights_digest"]  # a damage that the digests do not tell
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match="operands of an addition do not cover it"):
        load_pruned(tmp_path, model=ResidualNet)


def test_the_static_control_of_any_mask_runs() -> None:
    net = residual_net()
    channel_map = discover(net, IMAGES, residual="filter")
    expose_additions(net, channel_map.additions)
    mask = channel_map.full_mask()
    mask[[0, 1, 9, 19]] = False
    control = narrow_initialised(net, named_tensors(net).items(), Selection(channel_map, mask))
    assert [add.width for _, add in additions(control)] == [4, 5]
    assert control(batches(1)[0][0]).shape == (8, 4)
