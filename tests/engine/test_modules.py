"""The module is trained as it is: its frozen parameters, the modes of its layers, its buffers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse import FinalNetwork, Forward, Setup, SparseOffload

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
IMAGES = (torch.zeros(2, 3, 16, 16),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b1(self.c1(x))).mean((2, 3)))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 16, 16, generator=generator) + 5, torch.randint(0, 4, (8,), generator=generator))
        for _ in range(steps)
    ]


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def train(model: Any, steps: int = 12, rho: float = 0.5, **more: Any) -> FinalNetwork:
    session = SparseOffload(model, IMAGES, SGD, rho=rho, total_steps=steps, device="cpu", **more)
    for batch in batches(steps):
        session.step(partial(loss, batch=batch))
    return session.finalize()


# --- frozen parameters ---


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)])
def test_a_frozen_layer_keeps_its_bits_and_the_others_train_as_in_torch(optimizer: Any) -> None:
    """At rho = 1, in float64, against torch; a frozen layer in the middle of the order."""
    net = Net().double()
    for parameter in net.b1.parameters():
        parameter.requires_grad_(False)
    plain = copy.deepcopy(net).train()
    images, setup = IMAGES[0].double(), Setup(dtype=torch.float64)
    session = SparseOffload(net, images, optimizer, rho=1.0, total_steps=20, setup=setup, device="cpu")
    own = optimizer(plain.parameters())
    for batch in [(x.double(), y) for x, y in batches(20)]:
        session.step(partial(loss, batch=batch))
        own.zero_grad()
        loss(plain, batch).backward()
        own.step()
    trained = session.finalize().module
    assert torch.equal(trained.b1.weight, net.b1.weight)
    assert not trained.b1.weight.requires_grad
    for (name, a), b in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_frozen_parameters_and_their_slots_stand_still() -> None:
    """In narrow subnets, too."""
    net = Net()
    for parameter in net.c1.parameters():
        parameter.requires_grad_(False)
    before = net.c1.weight.clone()
    session = SparseOffload(net, IMAGES, SGD, rho=0.5, total_steps=12, device="cpu")
    for batch in batches(12):
        session.step(partial(loss, batch=batch))
    session.settle()
    assert torch.equal(session.store.own_rows("c1.weight"), before)
    assert not bool(session.store.own_rows("c1.weight", "momentum_buffer").any())
    assert bool(session.store.own_rows("fc.weight", "momentum_buffer").any())


def test_a_network_of_which_nothing_is_trained_is_refused() -> None:
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad"):
        SparseOffload(net, IMAGES, SGD, rho=0.5)


# --- modes ---


class Fixed(Net):
    """Its training mode holds the statistics, as detection networks do."""

    def train(self, mode: bool = True) -> Fixed:
        super().train(mode)
        self.b1.eval()
        return self


def with_statistics(net: Net) -> Net:
    assert net.b1.running_mean is not None
    assert net.b1.running_var is not None
    net.b1.running_mean.fill_(0.3)
    net.b1.running_var.fill_(2.0)
    return net


def in_evaluation_by_hand() -> Net:
    net = Net()
    net.b1.eval()
    return net


@pytest.mark.parametrize("build", [Fixed, in_evaluation_by_hand])
@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_statistics_that_the_model_holds_fixed_are_not_estimated_anew(build: Any, rho: float) -> None:
    final = train(with_statistics(build()), rho=rho)
    assert torch.equal(final.module.b1.running_mean, torch.full_like(final.module.b1.running_mean, 0.3))
    assert torch.equal(final.module.b1.running_var, torch.full_like(final.module.b1.running_var, 2.0))


def test_statistics_of_an_ordinary_norm_are_those_of_the_data() -> None:
    final = train(with_statistics(Net()))
    assert not bool(final.module.b1.running_mean.eq(0.3).any())


def test_dropout_that_is_held_in_evaluation_mode_drops_nothing() -> None:
    class Dropping(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9).eval()
            self.modes: set[bool] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.modes.add(self.drop.training)
            return self.drop(super().forward(x))

    session = SparseOffload(Dropping(), IMAGES, SGD, rho=0.5, total_steps=4, device="cpu")
    for batch in batches(4):
        session.step(partial(loss, batch=batch))
    for side in session.transfers.pair.sides:
        assert True not in side.module.modes


def test_evaluation_is_in_evaluation_mode_and_training_goes_on_in_its_own() -> None:
    session = SparseOffload(with_statistics(Fixed()), IMAGES, SGD, rho=0.5, total_steps=8, device="cpu")
    data = batches(8)
    for batch in data[:3]:
        session.step(partial(loss, batch=batch))
    with session.evaluation(data) as network:
        assert not any(layer.training for layer in network.modules())
    modes = {name: layer.training for name, layer in network.named_modules()}
    assert modes == {name: name != "b1" for name in modes}


# --- buffers ---


class Running(Net):
    """A running mean of the inputs, written into its buffer or assigned to it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            new = 0.9 * self.centre + 0.1 * x.detach().mean((0, 2, 3))
            if self.in_place:
                self.centre.copy_(new)
                self.seen += 1
            else:
                self.centre, self.seen = new, self.seen + 1
        return super().forward(x)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_a_buffer_is_kept_whether_forward_writes_into_it_or_assigns_it(in_place: bool, rho: float) -> None:
    """60 steps, each counted once: reference passes leave no trace."""
    final = train(Running(in_place), 60, rho)
    expected, data = torch.zeros(3), batches(60)
    for x, _ in data:
        expected = 0.9 * expected + 0.1 * x.mean((0, 2, 3))
    torch.testing.assert_close(final.module.centre, expected)
    assert int(final.module.seen) == 60


class Shared(Net):
    """A running mean that two modules hold; the first writes it, the second is read."""

    def __init__(self) -> None:
        super().__init__()
        centre = torch.zeros(3)
        self.writes, self.reads = nn.Module(), nn.Module()
        self.writes.register_buffer("centre", centre)
        self.reads.register_buffer("centre", centre)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.writes.centre.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return super().forward(x - self.reads.centre[:, None, None])


def beside_torch(net: Net, number: int, verify: bool = True) -> tuple[SparseOffload, Any]:
    """A network trained by a session, at rho = 1 in float64, and by torch alone, on as many batches."""
    plain = copy.deepcopy(net).train()
    setup = Setup(dtype=torch.float64, verify=verify)
    session = SparseOffload(net, IMAGES[0].double(), SGD, rho=1.0, total_steps=20, setup=setup, device="cpu")
    optimizer = SGD(plain.parameters())
    for x, y in batches(number):
        optimizer.zero_grad()
        loss(plain, (x.double(), y)).backward()
        optimizer.step()
        session.step(partial(loss, batch=(x.double(), y)))
    return session, plain


@pytest.mark.parametrize("verify", [True, False])
def test_a_buffer_of_two_modules_stays_one(verify: bool) -> None:
    """At rho = 1, in float64, against torch."""
    net = Shared().double()
    net.reads.centre = net.writes.centre  # .double() makes two of them
    session, plain = beside_torch(net, 6, verify)
    final = session.finalize([(x.double(), y) for x, y in batches(2)]).module
    torch.testing.assert_close(final.reads.centre, plain.reads.centre)
    assert final.reads.centre is final.writes.centre
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(final.get_parameter(name), parameter)


class Late(Net):
    """Writes into a buffer and a weight behind a norm, which still needs its own for the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.b1(self.c1(x))).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.fc.weight.mul_(0.9)
                self.centre.mul_(0.9).add_(0.1 * self.fc(features).mean(0))
        return self.fc(features) - self.centre


def test_a_forward_may_write_into_what_it_has_not_read_yet() -> None:
    """At rho = 1, in float64, against torch."""
    session, plain = beside_torch(Late().double(), 3)
    session.settle()
    for name, tensor in (*plain.named_parameters(), ("centre", plain.centre)):
        torch.testing.assert_close(session.store.own_rows(name), tensor)


class Counting(Net):
    """Counts in float64 what float32 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1 + 2.0**-40
        return super().forward(x)


def test_a_buffer_of_more_bits_than_the_weights_keeps_them() -> None:
    final = train(Counting, 12)
    assert torch.equal(final.module.seen, torch.tensor(12 * (1 + 2.0**-40), dtype=torch.float64))


class Growing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(self.cache) < len(x):
            self.cache = torch.arange(float(len(x)))
        return super().forward(x)


class Lazy(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2))
        return super().forward(x)


class Vanishing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.inner.mask = None
        return super().forward(x)


@pytest.mark.parametrize(("build", "name"), [(Growing, "cache"), (Lazy, "late"), (Vanishing, "inner.mask")])
def test_a_buffer_that_forward_changes_the_shape_of_is_refused_by_name(build: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"buffer '{name}'.* register it in the constructor"):
        train(build)


def test_frozen_batch_norm_of_the_whole_network_leaves_its_statistics() -> None:
    final = train(with_statistics(Net()), forward=Forward(frozen_batch_norm=True))
    assert torch.equal(final.module.b1.running_var, torch.full_like(final.module.b1.running_var, 2.0))
