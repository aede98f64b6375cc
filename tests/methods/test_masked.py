"""Training under masks: resume, equivalences, what is exported, what is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from offload_sparse import load_pruned
from offload_sparse.channels.accounting import train_cost_saving
from offload_sparse.config.methods import DFBSTConfig, DSTConfig
from offload_sparse.config.run import RunConfig, TrainConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.weight_masks import rigl
from offload_sparse.methods.weight_masks.dfbst import ForwardBackwardThresholds
from offload_sparse.methods.weight_masks.dst import TrainableThresholds
from offload_sparse.methods.weight_masks.grow_efficient import ChannelGates
from offload_sparse.methods.weight_masks.masked import MaskedTraining, build_masked
from offload_sparse.policy.config import PolicyConfig
from tests.methods.tasks import batches, make_method, make_task, small_net, train

METHODS = ("dst", "dfbst", "rigl", "grow_efficient")
LAYERS = ("0", "4", "7", "9")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigl, "INTERVAL", 3)
    monkeypatch.setattr(rigl, "FRACTION", 0.5)


def config_of(method: str, **more: Any) -> RunConfig:
    """Settings under which masks move within a few steps."""
    return RunConfig(
        method=cast(Any, method),
        dst=DSTConfig(alpha=5e-2),
        dfbst=DFBSTConfig(beta=50.0),
        round=RoundConfig(freeze_at=0.8),
        **({"policy": PolicyConfig(rho=0.4)} if method == "rigl" else {}) | more,
    )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def masks_of(method: MaskedTraining) -> dict[str, Tensor]:
    gates = method.sparsity
    return {"atoms": gates.mask()} if isinstance(gates, ChannelGates) else gates.masks()


def tensors(method: MaskedTraining) -> dict[str, Tensor]:
    state = method.state()
    assert state is not None
    return state.replicated


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_straight_and_interrupted_training_are_the_same_bit_for_bit(method: str, optimizer: Any) -> None:
    config = config_of(method, optim=OptimConfig(name=optimizer))
    data = batches(14)
    straight = make_method(config)
    losses = train(straight, data)
    first = make_method(config)
    train(first, data[:7])
    state = first.state()
    assert state is not None
    train(first, data[7:9])  # the state holds copies
    resumed = make_method(config)
    resumed.restore(state)
    assert train(resumed, data[7:]) == losses[7:]
    assert same(tensors(resumed), tensors(straight))
    assert resumed.spent_flops == straight.spent_flops


@pytest.mark.parametrize("method", METHODS)
def test_the_masks_of_the_resume_test_do_move(method: str) -> None:
    """Else it would prove little."""
    trained = make_method(config_of(method))
    before = masks_of(trained)
    train(trained, batches(14))
    assert not same(before, masks_of(trained))
    forward, backward = trained.report()["forward_remaining"], trained.report()["backward_remaining"]
    assert 0 < forward < 1
    assert (0 < backward < 1) == (method in ("dfbst", "rigl"))


def test_a_state_of_another_method_is_refused() -> None:
    state = make_method(config_of("dst")).state()
    assert state is not None
    with pytest.raises(ValueError, match="another network"):
        make_method(config_of("dfbst")).restore(state)


def test_dfbst_without_beta_is_dst_with_absolute_thresholds() -> None:
    config = config_of("dfbst")
    config.dfbst.beta = 0.0
    ours = make_method(config)
    alpha = config.dst.alpha
    reference = build_masked(make_task(config), lambda w: TrainableThresholds(w, alpha, absolute=True))
    data = batches(12)
    assert train(ours, data) == train(reference, data)
    state, wanted = tensors(ours), tensors(reference)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert isinstance(ours.sparsity, ForwardBackwardThresholds)
    assert all(not p.any() for p in ours.sparsity.own)
    assert ours.report()["backward_remaining"] == 1


@pytest.mark.parametrize("method", ["dst", "dfbst", "rigl"])
def test_the_final_network_is_the_trained_one_with_zeros_and_whole_biases(method: str) -> None:
    trained = make_method(config_of(method), frozen_batch_norm=True)
    train(trained, batches(14))
    masks = trained.sparsity.masks()
    final = trained.finalize([]).module
    images = batches(1)[0][0]
    with torch.no_grad(), trained.evaluation([]) as network:
        torch.testing.assert_close(final(images), network.eval()(images), rtol=0, atol=0)
    for name, parameter in final.named_parameters():
        if name in masks:
            assert not parameter[~masks[name]].any()
            assert method == "rigl" or parameter[masks[name]].all()  # what RigL has just grown is zero
        else:
            assert torch.equal(parameter, dict(trained.network.named_parameters())[name])
    assert [name.removesuffix(".weight") for name in masks] == list(LAYERS)


def test_an_exported_network_gives_the_same_logits(tmp_path: Path) -> None:
    trained = make_method(config_of("dst"))
    train(trained, batches(14))
    final = trained.finalize([batch[0] for batch in batches(2)])
    final.save(tmp_path)
    loaded = load_pruned(tmp_path, model=small_net)
    images = batches(1)[0][0]
    assert torch.equal(loaded(images), final.module(images))


def test_the_steps_of_every_method_are_counted_as_they_are_computed() -> None:
    """DST and DFBST need the whole gradient of the weights, RigL now and then, GrowEfficient always."""
    trained = {name: make_method(config_of(name)) for name in METHODS}
    for method in trained.values():
        train(method, batches(14))
    figures = {name: method.report() for name, method in trained.items()}
    for name in ("dst", "dfbst"):
        assert figures[name]["input_gradient_flops_ratio"] == figures[name]["flops_ratio"] < 1
        assert figures[name]["weight_gradient_flops_ratio"] == 1
    assert figures["dfbst"]["weight_gradient_kept_flops_ratio"] < 1
    rigl = figures["rigl"]
    assert rigl["weight_gradient_flops_ratio"] == pytest.approx(
        rigl["flops_ratio"] + (1 - rigl["flops_ratio"]) / 3
    )
    assert figures["grow_efficient"]["input_gradient_flops_ratio"] == 1
    assert figures["grow_efficient"]["weight_gradient_flops_ratio"] == 1


def test_what_the_two_ratios_count() -> None:
    """The remaining ratio counts weights, the parameter ratio all parameters."""
    method = make_method(config_of("dst"))
    train(method, batches(14))
    masks = method.sparsity.masks()
    kept, weights = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    total = sum(p.numel() for p in method.network.parameters())
    report = method.report()
    assert report["forward_remaining"] == pytest.approx(kept / weights)
    assert report["params_ratio"] == pytest.approx((kept + total - weights) / total)
    for name in LAYERS:
        assert report["layers"][name]["forward_remaining"] == pytest.approx(
            float(masks[f"{name}.weight"].double().mean())
        )
        assert method.dynamics()[f"forward_remaining.{name}"] == report["layers"][name]["forward_remaining"]


class Attending(nn.Module):
    """Images to 4 tokens, attention as torch has it, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.attention = nn.Conv2d(2, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, images: Tensor) -> Tensor:
        x = self.start(images).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.b(self.a(x).relu()).mean(1))


@pytest.mark.parametrize("method", ["dst", "dfbst", "rigl"])
def test_every_masked_weight_has_the_flops_of_its_products(method: str) -> None:
    """Torch's attention applies its last layer without calling it."""
    task = replace(make_task(config_of(method)), factory=Attending)
    built = build_method(task)
    assert isinstance(built, MaskedTraining)
    flops = dict(zip(built.sparsity.weights, built._layer_flops.tolist(), strict=True))
    layer = 2 * 4 * 8 * 8
    assert flops == {
        "start.weight": 2 * 4 * 8 * 32,
        "attention.out_proj.weight": layer,
        "a.weight": 2 * layer,
        "head.weight": 2 * 8 * 3,
    }


def test_what_grow_efficient_saves() -> None:
    """Three over two and the share of the forward pass."""
    method = make_method(config_of("grow_efficient"))
    forward = 0.0
    data = batches(10)
    for batch in data:
        train(method, [batch])
        # In training mode the shares are those of the gates of the step.
        forward += float(method._pass_flops()[0])
    dense = method.cost.dense_flops
    saving = train_cost_saving(dense, [(method.spent_flops, 1, 0)], len(data))
    assert saving == pytest.approx(3 / (2 + forward / len(data) / dense))
    assert 1 < saving < 1.5


def test_thresholds_are_not_decayed() -> None:
    def first_threshold(weight_decay: float) -> Tensor:
        config = config_of("dfbst", optim=OptimConfig(weight_decay=weight_decay, momentum=0.0))
        method = make_method(config)
        with torch.no_grad():
            for p in method.sparsity.parameters():
                p.fill_(0.01)
        before = copy.deepcopy(method.network.state_dict())
        train(method, batches(1))
        assert not same(before, method.network.state_dict())
        return torch.cat(list(method.sparsity.parameters())).detach()

    assert torch.equal(first_threshold(0.0), first_threshold(0.5))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: DSTConfig(alpha=-1), "dst.alpha"),
        (lambda: DFBSTConfig(beta=-1), "dfbst.beta"),
        (lambda: OptimConfig(milestones=[2]), "optim.milestones"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_leaving_out_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set train\.on_nonfinite to stop or rollback"):
        make_method(config_of("dst", train=TrainConfig(on_nonfinite="skip")))


def test_a_loss_that_is_not_finite_moves_nothing_and_is_told() -> None:
    method = make_method(config_of("dfbst"))
    train(method, batches(2))
    before = copy.deepcopy(method.network.state_dict())
    images, labels = batches(1)[0]
    method.train_step((images * torch.nan, labels), 0.05)
    for name, parameter in method.network.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(FloatingPointError, match="not finite"):
        method.records()
