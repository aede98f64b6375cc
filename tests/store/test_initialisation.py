"""A replayed initialisation equals the real one bit for bit, and never holds more than a few tensors."""

import gc
import random
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.store.initialisation import record
from offload_sparse.store.weight_store import WeightStore
from offload_sparse.workloads.models import build_model


class Holder(nn.Module):
    """One parameter and one buffer, made by a function."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.before = nn.Linear(3, 5)
        self.weight = nn.Parameter(make())
        self.register_buffer("copy", make())
        self.after = nn.Linear(5, 3)


def assert_replays(factory: Callable[[], nn.Module], seed: int = 3) -> None:
    """Names, dtypes, strides and bits of the replay are those of the model built for real."""
    recording = record(factory)
    assert recording.replayable, recording.reason
    torch.manual_seed(seed)
    model = factory()
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in recording.replay(seed):
        real = expected.pop(name).detach()
        assert value.device.type == "cpu"
        assert not value.requires_grad
        assert (value.dtype, value.stride()) == (real.dtype, real.stride()), name
        assert torch.equal(value, real), name
    assert not expected, f"never yielded: {list(expected)}"


def test_a_constant_that_two_layers_hold_stays_one() -> None:
    def build() -> nn.Module:
        layers, table = [nn.Linear(3, 3), nn.Linear(3, 3)], torch.from_numpy(np.arange(3.0))
        for layer in layers:
            layer.register_buffer("table", table)
        return nn.Sequential(*layers)

    assert_replays(build)
    model = record(build).model
    assert model[0].table is model[1].table


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "mobilenet_v2", "densenet121"),
        pytest.param("vgg16_bn", marks=pytest.mark.slow),  # 10^8 random numbers
        "convnext_tiny",
    ],
)
def test_torchvision_models(name: str) -> None:
    assert_replays(lambda: getattr(torchvision.models, name)(weights=None, num_classes=10))


def test_a_timm_model() -> None:
    assert_replays(lambda: timm.create_model("mobilenetv1_100", pretrained=False))


@pytest.mark.parametrize("name", ["vgg_small", "resnet20_cifar", "vgg16_cifar"])
def test_the_packages_own_models(name: str) -> None:
    assert_replays(lambda: build_model(f"offload_sparse/{name}"))


def initialised(fill: Callable[[Tensor], object]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = torch.empty(6, 4, 3, 3)
        fill(tensor)
        return tensor

    return make


@pytest.mark.parametrize(
    "make",
    [
        initialised(lambda t: nn.init.uniform_(t, -2.0, 0.5)),
        initialised(lambda t: nn.init.normal_(t, 1.0, 0.02)),
        initialised(lambda t: nn.init.constant_(t, 0.3)),
        initialised(lambda t: nn.init.kaiming_normal_(t, mode="fan_out")),
        initialised(lambda t: nn.init.kaiming_uniform_(t, a=5**0.5)),
        initialised(lambda t: nn.init.xavier_normal_(t)),
        initialised(lambda t: nn.init.xavier_uniform_(t)),
        initialised(lambda t: nn.init.trunc_normal_(t, std=0.02)),
        initialised(lambda t: nn.init.trunc_normal_(t, mean=3.0, std=1.0)),
        initialised(lambda t: t.uniform_(-0.9, 0.9).erfinv_().mul_(0.1).add_(1.0).clamp_(0.9, 1.2)),
        initialised(lambda t: t.normal_().div_(3).sub_(0.25).data.abs_()),
        initialised(lambda t: t.zero_()[0].fill_(7.0)),
        initialised(lambda t: t.normal_()[2:4].zero_()),
        initialised(lambda t: t.normal_().copy_(torch.ones(6, 1, 1, 1) * torch.arange(4.0)[:, None, None])),
        lambda: torch.empty(5, 4).t().normal_(),
        lambda: torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last).normal_(),
        lambda: torch.ones(7) * 1e-6,
        lambda: torch.randn(3, 4) * 0.02,
        lambda: torch.rand(9).neg().add_(1),
        lambda: torch.full((3,), 0.5).to(torch.float64),
        lambda: torch.tensor([0.25, 0.5]),
        lambda: torch.from_numpy(np.linspace(0.0, 1.0, 5)),
        lambda: nn.init.eye_(torch.empty(4, 4)),
        lambda: torch.cat([torch.zeros(2), torch.rand(3)]),
        lambda: nn.Linear(3, 4).half().weight.data,
    ],
)
def test_single_initialisers(make: Callable[[], Tensor]) -> None:
    assert_replays(lambda: Holder(make))


def of_an_own_generator() -> Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(3) * torch.rand(1).item(), "does not build on the meta device"),
        (lambda: torch.ones(4).cumsum(0), "weight: aten.cumsum"),
        (lambda: torch.normal(0.0, 1.0, (3,)), "random numbers outside"),
        (lambda: torch.rand(3, device="cpu"), "random numbers outside"),
        (lambda: torch.full((3,), random.random()), "random numbers outside"),
        (lambda: torch.full((3,), np.random.rand()), "random numbers outside"),
        (lambda: torch.randn_like(torch.empty(3)), "random numbers in a way"),
        (of_an_own_generator, "random numbers in a way"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_a_reason(make: Callable[[], Tensor], reason: str) -> None:
    recording = record(lambda: Holder(make))
    assert not recording.replayable
    assert reason in recording.reason
    assert "\n" not in recording.reason
    assert all(tensor.is_meta for tensor in recording.model.state_dict().values())
    with pytest.raises(AssertionError, match="cannot be replayed"):
        next(recording.replay(0))


@pytest.mark.parametrize(
    "initialise",
    [nn.init.orthogonal_, lambda t: nn.init.sparse_(t.view(2, 6), 0.5), nn.init.dirac_],
    ids=["orthogonal", "sparse", "dirac"],
)
def test_initialisers_that_torch_writes_differently_by_version(
    initialise: Callable[[Tensor], object],
) -> None:
    """New versions skip their work on the meta device; of torch 2.11 some are replayed. None is wrong."""

    def make() -> Tensor:
        weight = torch.empty(2, 2, 3)
        initialise(weight)
        return weight

    recording = record(lambda: Holder(make))
    if recording.replayable:
        assert_replays(lambda: Holder(make))
    else:
        assert recording.reason


def test_draws_that_are_overwritten_still_move_the_random_stream() -> None:
    def factory() -> nn.Module:
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
        nn.init.normal_(model[1].weight)
        nn.init.zeros_(model[1].weight)
        with torch.no_grad():
            torch.rand(17)  # thrown away
            model[3].weight.normal_(0, 0.01)
            model[2].weight[1:3].uniform_(5, 6)
        return model

    assert_replays(factory)


def test_tensors_that_are_computed_from_one_another() -> None:
    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4))
            self.second = nn.Parameter(self.first.detach() * 2)
            self.between = nn.Parameter(torch.randn(4))
            with torch.no_grad():
                self.first.add_(1)
                self.between.copy_(self.between + self.first)
                self.second.uniform_()
            self.alias = nn.Parameter(self.first.data)

    assert_replays(Derived)


def test_tied_parameters_come_once() -> None:
    def factory() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    assert_replays(factory)
    assert [name for name, _ in record(factory).replay(0)].count("0.weight") == 1


def test_buffers_come_too_integer_and_non_persistent_ones_included() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("steps", torch.arange(4))
            self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    assert_replays(Buffers)
    names = {name for name, _ in record(Buffers).replay(0)}
    assert names >= {"norm.num_batches_tracked", "norm.running_var", "steps", "scale"}


def test_what_the_construction_leaves_undefined_is_zero() -> None:
    values = dict(record(lambda: Holder(lambda: torch.empty(3, 2))).replay(0))
    assert torch.equal(values["weight"], torch.zeros(3, 2))


def test_values_are_drawn_in_the_models_dtype_and_a_store_converts_them() -> None:
    recording = record(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    single = dict(recording.replay(7))
    shapes = {name: tuple(value.shape) for name, value in single.items() if value.is_floating_point()}
    channel_map = ChannelMap((), shapes, {name: (None,) * len(shape) for name, shape in shapes.items()})
    store = WeightStore(channel_map, tuple(shapes), (), dtype=torch.float64)
    store.fill(recording.replay(7))
    for name in shapes:
        assert single[name].dtype == torch.float32
        assert torch.equal(store.own_rows(name), single[name].double())
    assert store.integer_buffers["1.num_batches_tracked"].dtype == torch.int64


def test_the_seed_decides_the_values() -> None:
    recording = record(lambda: nn.Linear(3, 4))
    first, again, other = (dict(recording.replay(seed))["weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_callers_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    recording = record(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    expected = dict(recording.replay(5))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in recording.replay(5):
        torch.rand(13)
        assert torch.equal(value, expected[name])


def test_a_conversion_of_the_whole_model_is_replayed_tensor_by_tensor() -> None:
    def factory() -> nn.Module:
        return many_equal_layers().half()

    assert_replays(factory)
    recording = record(factory)
    with LiveBytes() as counter:
        for _ in recording.replay(0):
            pass
    assert counter.peak < 3 * 128 * 128 * 4


def test_the_recorded_model_has_the_structure_and_holds_no_values() -> None:
    recording = record(lambda: torchvision.models.resnet18(weights=None))
    assert isinstance(recording.model, torchvision.models.ResNet)
    assert all(tensor.is_meta for tensor in recording.model.state_dict().values())
    assert nn.init.trunc_normal_(torch.empty(9)).abs().sum() > 0  # what recording replaced is back


def test_a_fault_of_the_factory_is_the_factorys_own_error() -> None:
    def factory() -> nn.Module:
        raise KeyError("no such model")

    with pytest.raises(KeyError, match="no such model"):
        record(factory)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the CPU storages that operations return, until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}

    @property
    def live(self) -> int:
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        return sum(self._storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result


def many_equal_layers() -> nn.Module:
    """40 layers of 64 KiB; all weights are drawn twice, and scaled once more at the very end."""
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(40)])
    for layer in model:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.5)
    return model


def test_the_replay_holds_less_than_three_of_the_largest_tensors() -> None:
    assert_replays(many_equal_layers)
    recording = record(many_equal_layers)
    largest = 128 * 128 * 4
    with LiveBytes() as counter:
        for _ in recording.replay(0):
            pass
    assert largest <= counter.peak < 3 * largest


def test_the_counter_sees_a_replay_whose_tensors_are_all_kept() -> None:
    """The measurement above would notice: kept tensors count to the size of the whole model."""
    recording = record(many_equal_layers)
    with LiveBytes() as counter:
        kept: list[Tensor] = [value for _, value in recording.replay(0)]
    assert counter.peak >= sum(value.nbytes for value in kept) > 30 * 128 * 128 * 4
    del kept
    gc.collect()
    assert counter.live < 128 * 128 * 4
