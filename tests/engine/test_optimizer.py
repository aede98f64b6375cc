"""Any torch optimizer whose step of a weight depends on that weight alone can be used; others are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn, optim

from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.optimizer import LossScale, group_parameters, probe
from offload_sparse.engine.session import SparseOffload
from offload_sparse.policy.config import PolicyConfig
from tests.support.optimizers import Corrected, Counting, Lion, Numbered
from tests.support.sessions import arrays, assert_same, batches, loss_fn, loss_of, make_session, small_net


class Normalised(Lion):
    """Divides by the norm of the whole parameter, as LARS and LAMB do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class ByShape(Lion):
    """Treats matrices in a way of its own, as Muon and MARS do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad.sign() if p.dim() > 1 else p.grad, alpha=group["lr"])


class Factored(Lion):
    """Keeps a statistic of another shape than the parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p]["rows"] = torch.zeros(2)
                p.sub_(p.grad, alpha=group["lr"])


USABLE = {
    "sgd": partial(optim.SGD, lr=0.05),
    "momentum": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(optim.Adam, lr=1e-2),
    "amsgrad": partial(optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=1e-2, weight_decay=0.1),
    "nadam": partial(optim.NAdam, lr=1e-2),
    "radam": partial(optim.RAdam, lr=1e-2),
    "rmsprop": partial(optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": optim.Adadelta,
    "adamax": optim.Adamax,
    "rprop": partial(optim.Rprop, lr=1e-3),
    "lion": partial(Lion, lr=1e-3, weight_decay=0.1),
    "counting": partial(Counting, lr=0.05),
    "corrected": partial(Corrected, lr=0.05),
    "numbered": partial(Numbered, lr=0.05),
    "a list of the parameters": lambda ps: optim.SGD([p for p in ps if p.requires_grad], lr=0.05),
}


def step_both(
    session: SparseOffload, plain: nn.Module, own: optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> None:
    session.step(loss_of(batch))
    own.zero_grad()
    loss_fn(plain, batch).backward()
    own.step()


def assert_ends_as(session: SparseOffload, plain: nn.Module) -> None:
    trained = session.finalize([batches(1)[0][0]]).module
    for (key, a), b in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", USABLE)
def test_at_rho_one_an_optimizer_is_that_of_torch(name: str) -> None:
    """Seven steps in rounds of three, in float64."""
    net = small_net(batch_norm=False)
    plain = copy.deepcopy(net).train()
    session = make_session(net, PolicyConfig.paper(rho=1.0), RoundConfig(k=3), optimizer=USABLE[name])
    own = USABLE[name](plain.parameters())
    for batch in batches(7):
        step_both(session, plain, own, batch)
    assert_ends_as(session, plain)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_an_optimizer_is_tried_in_float32_whatever_the_default_is(default: torch.dtype) -> None:
    expected = probe(USABLE["adamw"])
    torch.set_default_dtype(default)
    assert probe(USABLE["adamw"]) == expected


@pytest.mark.parametrize("name", USABLE)
def test_a_step_that_is_not_finite_moves_neither_weights_nor_slots(name: str) -> None:
    rounds, more = RoundConfig(k=3), {"optimizer": USABLE[name], "on_nonfinite": "skip"}
    session = make_session(small_net(), PolicyConfig.paper(rho=0.5), rounds, **more)  # type: ignore[arg-type]
    data = batches(5)
    data[4][0].fill_(torch.nan)
    for batch in data[:4]:
        session.step(loss_of(batch))
    good = arrays(session)
    session.step(loss_of(data[4]))
    assert_same(arrays(session), good)


REFUSED = {
    "LBFGS": (optim.LBFGS, "LBFGS cannot step a flat parameter"),
    "SparseAdam": (optim.SparseAdam, "SparseAdam cannot step a flat parameter"),
    "Adafactor": (optim.Adafactor, "the step that Adafactor makes of a weight depends on other weights"),
    "Normalised": (Normalised, "the step that Normalised makes of a weight depends on other weights"),
    "norms at a small rate": (partial(Normalised, lr=1e-5), "depends on other weights"),
    "ByShape": (ByShape, r"norms, matrices, dampening"),
    "AdamP": (partial(timm.optim.AdamP, lr=1e-4), "depends on other weights"),
    "Muon of timm": (timm.optim.Muon, "depends on other weights"),
    "Factored": (Factored, "Factored keeps 'rows', neither a value per weight nor a scalar"),
    "Muon": (optim.Muon, "the optimizer Muon cannot be made"),
    "dampening": (partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5), "on which step is its first"),
    "instance": (optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "is an instance of SGD, over other"),
    "settings": (OptimConfig(), "the settings of a run, which have a schedule"),
    "text": ("sgd", "the optimizer 'sgd' cannot be made"),
    "module": (lambda parameters: nn.Linear(1, 1), "returns Linear"),
    "any error": (lambda parameters: parameters["all"], "cannot be made"),
    "groups": (
        lambda ps: optim.SGD([{"params": [p for p in ps if p.dim() == n]} for n in (1, 2)], lr=0.1),
        "makes 2 parameter groups of 1; leave that to the arguments groups",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name: str) -> None:
    factory, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        probe(factory)  # type: ignore[arg-type]


# --- parameter groups ---


def settings_of(name: str) -> Mapping[str, Any] | None:
    return {"lr": 0.005, "weight_decay": 0.3} if name.startswith("conv2") else None


@pytest.mark.parametrize("name", ["momentum", "adamw", "lion"])
def test_parameter_groups_are_those_of_torch(name: str) -> None:
    """Rates and decay of their own, in the middle of the order; at rho = 1 against torch, in float64."""
    net = small_net()
    plain = copy.deepcopy(net).train()
    rounds, policy = RoundConfig(k=3), PolicyConfig.paper(rho=1.0)
    session = make_session(net, policy, rounds, optimizer=USABLE[name], groups=settings_of)
    named = dict(plain.named_parameters())
    others = [p for n, p in named.items() if not n.startswith("conv2")]
    own = USABLE[name](
        [{"params": others}, {"params": [named["conv2.weight"]], "lr": 0.005, "weight_decay": 0.3}]
    )
    for batch in batches(7):
        step_both(session, plain, own, batch)
    assert_ends_as(session, plain)


OF_A_GROUP: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (partial(optim.SGD, lr=0.05), {"momentum": 0.9}),
    "amsgrad": (partial(optim.Adam, lr=1e-2), {"amsgrad": True}),
    "centered": (partial(optim.RMSprop, lr=1e-3), {"centered": True}),
    "first steps": (partial(optim.Rprop, lr=1e-3), {"lr": 2.0**-7}),
}
"""State that the factory's own settings do not need, or that begins with another value."""


@pytest.mark.parametrize("name", OF_A_GROUP)
def test_a_group_keeps_the_state_that_its_settings_need(name: str) -> None:
    """Over the ends of rounds, and by a state_dict; at rho = 1 against torch, in float64."""
    factory, settings = OF_A_GROUP[name]
    net = small_net(batch_norm=False)
    plain = copy.deepcopy(net).train()
    named = dict(plain.named_parameters())
    others = [p for n, p in named.items() if not n.startswith("conv2")]
    own = factory([{"params": others}, {"params": [named["conv2.weight"]], **settings}])

    def made() -> SparseOffload:
        groups = lambda name: settings if name.startswith("conv2") else None  # noqa: E731
        rounds, policy = RoundConfig(k=3), PolicyConfig.paper(rho=1.0)
        return make_session(net, policy, rounds, optimizer=factory, groups=groups)

    session = made()
    for step, batch in enumerate(batches(7)):
        if step == 4:
            state, session = session.state_dict(), made()
            session.load_state_dict(state)
        step_both(session, plain, own, batch)
    assert_ends_as(session, plain)


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [("sgd", {"momentum": 0.9}, "momentum_buffer"), ("adam", {"amsgrad": True}, "max_exp_avg_sq")],
)
def test_a_setting_that_comes_to_need_more_state_is_refused(name: str, settings: Any, kept: str) -> None:
    session = make_session(
        small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=3), optimizer=USABLE[name]
    )
    session.step(loss_of(batches(1)[0]))
    session.optimizer.param_groups[0].update(settings)
    with pytest.raises(ValueError, match=f"begins to keep '{kept}' for a setting that has changed"):
        session.step(loss_of(batches(1)[0]))


def test_groups_change_nothing_but_their_settings() -> None:
    """Whatever order the flat buffers have then."""

    def trained(groups: Any) -> dict[str, Tensor]:
        policy = PolicyConfig.paper(rho=0.5, lr=0.05)
        session = make_session(small_net(), policy, RoundConfig(k=3), groups=groups)
        for batch in batches(9):
            session.step(loss_of(batch))
        session.settle()
        kinds = session.store.partitions.items()
        return {f"{k}/{n}": session.store.own_rows(n, k).clone() for k, p in kinds for n in p.layout.shapes}

    alone = trained(None)
    apart = trained(lambda name: {"lr": 0.05} if name.startswith("conv2") else {})
    for name in alone:
        torch.testing.assert_close(apart[name], alone[name], rtol=1e-12, atol=1e-14, msg=name)


def test_no_decay_takes_biases_and_norms_out_of_the_decay() -> None:
    groups = group_parameters(small_net(), None, no_decay=True)
    assert [group.names for group in groups] == [
        ("conv1.weight", "conv2.weight", "head.weight"),
        ("conv1.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "head.bias"),
    ]
    assert [dict(group.settings) for group in groups] == [{}, {"weight_decay": 0.0}]


def test_a_group_may_have_its_own_decay_beside_no_decay() -> None:
    def own(name: str) -> dict[str, float]:
        return {"weight_decay": 0.5} if name == "norm1.bias" else {}

    groups = group_parameters(small_net(), own, no_decay=True)
    found = {name: group.settings.get("weight_decay") for group in groups for name in group.names}
    assert (found["norm1.bias"], found["norm1.weight"], found["head.weight"]) == (0.5, 0.0, None)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(lambda name: {"momentun": 0.5}, "no setting 'momentun'"), (lambda name: 0.1, "return a dict")],
)
def test_a_group_that_the_optimizer_does_not_know_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_session(small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(), groups=groups)


# --- what the session shows ---


def test_a_scheduler_of_torch_sets_the_rates_of_all_groups() -> None:
    """OneCycleLR moves rates and betas; at rho = 1 against torch with the same scheduler."""
    net = small_net()
    plain = copy.deepcopy(net).train()
    rounds, policy = RoundConfig(k=3), PolicyConfig.paper(rho=1.0)
    session = make_session(net, policy, rounds, optimizer=USABLE["adamw"])
    own = USABLE["adamw"](plain.parameters())
    schedules = [optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (session.optimizer, own)]
    for batch in batches(8):
        step_both(session, plain, own, batch)
        for schedule in schedules:
            schedule.step()
    assert session.optimizer.param_groups[0]["lr"] == own.param_groups[0]["lr"]
    assert_ends_as(session, plain)


# --- accumulation, scaled losses, moving average ---


def test_a_batch_in_parts_is_the_batch() -> None:
    """Gradients, losses and s, up to the order of sums; without BatchNorm, which sees parts only."""

    def trained(parts: int) -> dict[str, Tensor]:
        policy = PolicyConfig.paper(rho=0.5, lr=0.05)
        session = make_session(small_net(batch_norm=False), policy, RoundConfig(k=3))
        for x, y in batches(9):
            closures = [loss_of(part) for part in zip(x.chunk(parts), y.chunk(parts), strict=True)]
            session.step(closures if parts > 1 else closures[0])
        return arrays(session) | {"s": session.policy.s}

    whole, parts = trained(1), trained(4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-11, msg=name)


def scaled_session(scaler: torch.amp.GradScaler | None) -> SparseOffload:
    policy = PolicyConfig.paper(rho=0.5, lr=0.05)
    return make_session(small_net(), policy, RoundConfig(k=3), forward=Forward(scaler=scaler))


def test_a_scaled_loss_trains_the_same_bits() -> None:
    """Scales are powers of two, and float64 does not overflow by them; a gradient that does is left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    plain, scaled = scaled_session(None), scaled_session(scaler)
    for batch in batches(6):
        plain.step(loss_of(batch))
        scaled.step(loss_of(batch))
    assert_same(arrays(scaled), arrays(plain))
    assert scaled.loss_scale is not None
    assert float(scaled.loss_scale.scale) == 2.0**11, "four good steps double it"
    good = arrays(scaled)

    def overflowing(network: nn.Module) -> Tensor:
        zero = sum(p.sum() for p in network.parameters()) * 0
        return loss_fn(network, batches(1)[0]) + 1e308 * (zero + 1).log()

    scaled.step(overflowing)
    del good["buffers"]
    assert_same(arrays(scaled), good)
    assert float(scaled.loss_scale.scale) == 2.0**10
    assert not any(record.fault for record in scaled.records()), "an overflow of the scale is no fault"


def test_a_scale_does_not_grow_beyond_what_float32_holds() -> None:
    """In bf16 nothing overflows before it; all steps from then on would be left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    scale = LossScale(scaler, torch.device("cpu"))
    for _ in range(3):
        scale.update(torch.zeros(()))
    assert float(scale.scale) == 2.0**127


def test_the_moving_average_is_what_is_evaluated() -> None:
    """The average over the final phase; it is also what is handed out."""
    session = make_session(
        small_net(False), PolicyConfig.paper(rho=1.0), RoundConfig(k=2), optimizer=USABLE["sgd"], ema=0.75
    )
    plain = small_net(False).train()
    own, average = USABLE["sgd"](plain.parameters()), [torch.zeros(0)]
    for step, batch in enumerate(batches(5)):
        step_both(session, plain, own, batch)
        now = [p.detach().clone() for p in plain.parameters()]
        average = now if step == 0 else [0.75 * a + 0.25 * b for a, b in zip(average, now, strict=True)]
    with session.evaluation() as network:
        evaluated = [p.detach().clone() for p in network.parameters()]
    session.step(loss_of(batches(6)[5]))
    own.zero_grad()
    loss_fn(plain, batches(6)[5]).backward()
    own.step()
    for found, expected in zip(evaluated, average, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    average = [0.75 * a + 0.25 * p.detach() for a, p in zip(average, plain.parameters(), strict=True)]
    for found, expected in zip(session.finalize().module.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-11)


def test_a_search_keeps_no_average_before_its_final_mask() -> None:
    session = make_session(
        small_net(), PolicyConfig.paper(rho=0.5), RoundConfig(k=2, freeze_at=0.5), total=8, ema=0.5
    )
    for step, batch in enumerate(batches(8)):
        session.step(loss_of(batch))
        assert session.ema_steps == max(0, step - 3)
    assert bool(arrays(session)["ema"].any())
