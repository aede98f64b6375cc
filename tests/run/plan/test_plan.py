"""The plan is right: against exact accounting of what a session allocates, and by itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload_sparse.bench.plan import build_session, case
from offload_sparse.channels.config import AtomsConfig
from offload_sparse.channels.selection import Selection
from offload_sparse.config.methods import StaticConfig
from offload_sparse.config.run import MethodName, RunConfig, resolve
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.losses import TAIL
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.width_search import MEMORY_ROOM
from offload_sparse.run.plan import fit, plan
from offload_sparse.run.plan.dry_run import Structure, model_arguments, structure_of
from offload_sparse.run.plan.fit import check, largest_rho, shortage
from offload_sparse.run.plan.live_bytes import LiveBytes
from offload_sparse.run.plan.machine import Machine
from offload_sparse.run.plan.plan import PLANNED, Planner
from offload_sparse.run.teacher import Teacher
from offload_sparse.store.config import StoreConfig
from offload_sparse.store.weight_store import WEIGHTS, Ranks, WeightStore
from offload_sparse.workloads.config import DataConfig, ModelConfig
from offload_sparse.workloads.data.loader import DeclaredData, declared_data
from offload_sparse.workloads.models import build_model
from tests.support.planned_runs import CASES, SMALL, train

LARGE = Machine(1, 1, 1 << 50, None)


_structures: dict[str, Structure] = {}
"""Discovery takes longer than what is made of it, and most cases share a network."""


def planner_of(config: RunConfig, device: str = "cpu") -> Planner:
    data = declared_data(config.data)
    config = replace(config, atoms=resolve(config, device).atoms)
    key = repr((config.model, data, config.atoms, config.train.precision))
    if key not in _structures:
        _structures[key] = structure_of(config, data)
    return Planner(config, data, _structures[key])


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", ["vgg", "mlp", "every_step", "one_pair", "local", "family", "short"])
def test_the_arrays_of_the_subnets_are_those_that_are_planned(name: str) -> None:
    """Entries of every array of both pairs, and of those how many are written."""
    config = CASES[name]
    session = build_session(config)
    first = planner_of(config).first_rounds(2)
    pairs = tuple(session.transfers._pairs)
    written: dict[tuple[int, int, str], int] = {}

    def note() -> None:
        for number, pair in enumerate(pairs):
            for index, side in enumerate(pair.active if pair.wanted else ()):
                for kind, array in side.arrays.items():
                    key = (number, index, kind)
                    written[key] = max(written.get(key, 0), array.numel())

    train(session, config, note)
    memory = [m for pair in pairs for side in pair.sides for m in side._memory.values()]
    gradients = max(
        size for (_, side, kind), size in written.items() if kind == WEIGHTS and side in (0, turns(config))
    )
    assert first.reserved == sum(m.numel() for m in memory) + session.transfers._reduce_memory.numel()
    assert first.touched == sum(written.values()) + gradients + TAIL


def test_only_a_run_with_time_for_a_search_has_room_for_other_widths() -> None:
    """And for the subnet of the next round beside that of the open one."""
    short, long = (replace(CASES["short"].train, max_steps=steps) for steps in (6_000, 60_000))
    held = [planner_of(replace(CASES["short"], train=t)).first_rounds(2).reserved for t in (short, long)]
    assert held[1] > 3 * held[0]


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_a_step_of_moved_widths_fits_what_is_planned(name: str) -> None:
    """Whatever spends the budget and keeps to the room that a search has."""
    config = replace(CASES[name], policy=CASES["short"].policy, round=CASES["short"].round)
    planner = planner_of(replace(config, train=replace(config.train, max_steps=60_000)))
    first, costs = planner.first_rounds(2), planner.structure.cost
    (even,), images, generator = first.family, planner._images(LARGE), torch.Generator().manual_seed(0)
    planned = planner.step_bytes(first, LARGE) - 4 * planner._batch_bytes(images)
    tried = 0
    while tried < 4:
        mask = torch.zeros_like(even)
        for group in planner.channel_map.groups:
            change = (0.4 * torch.randn((), generator=generator)).exp()
            width = min(group.size, max(1, int(change * even[group.start : group.stop].sum())))
            mask[group.start : group.start + width] = True
        spends = 0.9 < costs.flops(mask) / costs.flops(even) < 1.02
        if not spends or not 1.05 < costs.outputs(mask) / costs.outputs(even) <= MEMORY_ROOM:
            continue
        sides = (replace(first.rounds[0][0], selection=Selection(planner.channel_map, mask)),)
        assert planner._passes(first, sides, images) <= planned
        tried += 1


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_family_is_planned_with_all_members_that_a_step_trains(precision: str) -> None:
    config = replace(CASES["family"], train=replace(SMALL.train, precision=precision))  # type: ignore[arg-type]
    planner = planner_of(config)
    names = [n for n, p in planner.structure.model.named_parameters() if p.dim() == 1 and "fc" not in n]
    shapes = planner.channel_map.shapes
    own = sum(shapes[name][0] for name in names)
    alone = replace(config, policy=replace(config.policy, rho=0.4, budgets=[]))
    single = Planner(alone, planner.data, planner.structure)
    assert planner.store_bytes(1) == single.store_bytes(1) + 2 * own * 3 * 4
    largest, rest = single.memory(LARGE), [single.with_rho(rho).memory(LARGE) for rho in (0.1, 0.2)]
    together = planner.memory(LARGE).activations
    assert largest.activations < together < largest.activations + sum(m.activations for m in rest)


def turns(config: RunConfig) -> int:
    """The last side that is trained."""
    return int(config.round.reference == "turns")


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", ["vgg", "mlp", "every_step", "one_pair", "local"])
def test_predicted_traffic_is_what_a_run_moves(name: str) -> None:
    """A run whose probabilities stand still."""
    config = replace(CASES[name], policy=PolicyConfig(rho=0.25, lr=0))
    session = build_session(config)
    moved = []
    train(session, config, lambda: moved.append(session.round_bytes))
    assert len(set(moved)) == 2, "the first filling, and the way from the first round to the second"
    assert sum(planner_of(config).traffic(LARGE, 2)) == moved[-1]


def test_nothing_is_moved_between_rounds_that_keep_every_channel() -> None:
    config = replace(SMALL, policy=PolicyConfig(rho=1.0))
    planner = planner_of(config)
    assert planner.traffic(LARGE) == (0, 0)
    weights = sum(p.numel() for p in planner.structure.model.parameters())
    assert planner.first_rounds(4).reserved >= 3 * weights


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_predicted_store_bytes_are_those_of_the_largest_rank(name: str, ranks: int) -> None:
    planner = planner_of(CASES[name])
    slots = ("exp_avg", "exp_avg_sq") if name == "resnet" else ("momentum_buffer",)
    names = [n for n, _ in planner.structure.model.named_parameters()]
    buffers = [n for n, b in planner.structure.model.named_buffers() if b.is_floating_point()]
    stores = [
        WeightStore(planner.channel_map, tuple(names), tuple(buffers), slots, ranks=Ranks(rank, ranks))
        for rank in range(ranks)
    ]
    assert planner.store_bytes(ranks) == max(store.nbytes for store in stores)
    config = replace(planner.config, store=replace(planner.config.store, tier="file"))
    on_disk = Planner(config, planner.data, planner.structure)
    memory = on_disk.memory(Machine(ranks, ranks, 1 << 50, 1 << 50))
    assert (memory.store, memory.files) == (0, planner.store_bytes(ranks))


def test_a_second_rank_halves_the_store_and_the_batch() -> None:
    planner = planner_of(SMALL)
    one, two = (planner.memory(Machine(n, n, 1 << 50, 1 << 50)) for n in (1, 2))
    assert two.store == pytest.approx(one.store / 2, rel=0.02)
    assert two.subnets == one.subnets
    assert 0.45 * one.activations < two.activations < 0.9 * one.activations
    assert sum(planner.traffic(Machine(2, 2, 1 << 50, None))) == sum(planner.traffic(LARGE)) / 2


def test_ranks_that_talk_once_per_round_send_about_a_twentieth() -> None:
    """Every entry of the trained subnet once to the owners of its rows and once back; outer momentum is one
    more slot in the store. Masks that persist leave most of a subnet on the device with ``step``, which then
    sends little beside the gradients.
    """
    step = replace(SMALL, round=RoundConfig(k=50, reference="every_step"))
    local = replace(SMALL, round=RoundConfig(k=50, reference="every_step", sync="round", outer=[1.0, 0.5]))
    machine = Machine(2, 2, 1 << 50, None)
    assert planner_of(local).sent(machine) < planner_of(step).sent(machine) / 19
    assert planner_of(step).sent(LARGE) == 0
    plain, outer = (planner_of(config).store_bytes(1) for config in (step, local))
    weights = sum(p.numel() for p in planner_of(SMALL).structure.model.parameters())
    assert outer - plain == 4 * weights


def test_a_run_that_does_not_fit_is_refused_with_what_would() -> None:
    data, planner = declared_data(SMALL.data), planner_of(SMALL)
    memory = planner.memory(LARGE)
    assert not shortage(memory, LARGE)
    tight = Machine(1, 1, int(memory.host * 0.9), None)
    with pytest.raises(ValueError, match=r"GiB of host memory are needed .* set ") as refusal:
        check(SMALL, data, tight)
    assert "\n" not in str(refusal.value)
    assert re.search(r"set policy\.rho 0\.\d+$", str(refusal.value))


def test_the_advised_rho_fits_and_the_next_one_does_not() -> None:
    planner = planner_of(SMALL, "cuda")
    device = int(planner.memory(Machine(1, 1, 1 << 50, 1 << 50)).device * 0.8)
    machine = Machine(1, 1, 1 << 50, device)
    rho = largest_rho(planner, machine)
    assert rho is not None
    assert rho < 0.25
    assert not shortage(planner.with_rho(rho).memory(machine), machine)
    assert shortage(planner.with_rho(rho + 0.01).memory(machine), machine)
    with pytest.raises(ValueError, match=rf"device memory .* set policy\.rho {rho:g}"):
        check(SMALL, planner.data, machine)


def test_where_only_the_store_is_too_large_the_file_tier_is_advised() -> None:
    planner = planner_of(CASES["mlp"])
    machine = Machine(1, 1, planner.store_bytes(1) // 2, 1 << 50)
    assert "set store.tier file" in fit.advice(planner, machine)


def test_small_networks_are_let_through_without_a_search_for_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(plan, "structure_of", fail)
    check(SMALL, declared_data(SMALL.data), LARGE)
    check(replace(SMALL, method="dense"), declared_data(SMALL.data), Machine(1, 1, 1, None))


def test_dense_training_takes_what_its_arrays_take() -> None:
    """Weights, gradients and momentum; on several ranks the gradients once more, in buckets."""
    planner = planner_of(replace(SMALL, method="dense"))
    weights = 4 * sum(p.numel() for p in planner.structure.model.parameters())
    buffers = 4 * sum(b.numel() for b in planner.structure.model.buffers() if b.is_floating_point())
    one, two = (planner.memory(Machine(n, n, 1 << 50, 1 << 50)) for n in (1, 2))
    assert one.subnets == 3 * weights + buffers
    assert two.subnets == 4 * weights + buffers
    assert two.activations == pytest.approx(one.activations / 2, rel=0.1)


class Grey:
    """Images for a teacher."""

    def __len__(self) -> int:
        return 300

    def decode(self, indices: torch.Tensor) -> Any:
        return SimpleNamespace(pixels=torch.full((len(indices), 3, 16, 16), 99, dtype=torch.uint8))


@pytest.fixture(scope="module")
def bytes_of_a_teacher(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What its pass over the images has made at most."""
    factory = partial(build_model, SMALL.model.name, **model_arguments(SMALL, declared_data(SMALL.data)))
    folder = tmp_path_factory.mktemp("teacher")
    with LiveBytes() as made:
        Teacher(factory, Grey(), lambda x: x / 255, folder, 10).compute(quiet=True)  # type: ignore[arg-type]
    return made.peak


@pytest.mark.parametrize("method", ["static", "sparse_offload"])
def test_a_teacher_is_planned_on_the_host(method: MethodName, bytes_of_a_teacher: int) -> None:
    """Before the first step, with all that its pass over the images makes; no rho makes that less."""
    taught = replace(SMALL.train, precision="bf16", distill=True)
    config = replace(SMALL, train=taught, model=replace(SMALL.model, weights="dense"), method=method)
    planner = planner_of(config)
    machine = Machine(1, 1, 1 << 50, 1 << 50)
    assert planner.memory(machine).initialising == pytest.approx(bytes_of_a_teacher, rel=0.05)
    narrow = replace(machine, host=bytes_of_a_teacher)
    assert shortage(planner.memory(narrow), narrow)
    assert fit.advice(planner, narrow) == "set train.distill false"


def test_dense_static_and_sampled_training_are_planned_side_by_side() -> None:
    found = fit.figures(SMALL, Machine(1, 1, 1 << 50, 1 << 50))
    dense, static, own = (found["beside"][name] for name in PLANNED)
    assert own == {name: found[name] for name in own}
    assert static["device_bytes"] < own["device_bytes"] < dense["device_bytes"]
    assert own["host_store_bytes"] > 0
    assert dense["host_store_bytes"] == static["host_store_bytes"] == 0


def test_the_channels_are_those_of_the_planned_device() -> None:
    """Runs of eight on a GPU and single ones on a CPU, wherever the plan is made."""
    small = replace(SMALL, policy=PolicyConfig.paper(rho=0.06))
    for machine, block in ((Machine(1, 1, 1 << 50, 1 << 50), "<=8"), (LARGE, "1")):
        asked = planner_of(replace(small, atoms=AtomsConfig(block))).memory(machine)
        assert fit.figures(small, machine)["device_bytes"] == asked.device


def test_images_that_are_not_square_are_planned_as_they_are() -> None:
    machine = Machine(1, 1, 1 << 50, 1 << 50)
    square, wide, tall = (
        Planner.of(SMALL, DeclaredData(10, 3, shape, 10_000), machine).memory(machine).activations
        for shape in ((16, 16), (16, 64), (64, 16))
    )
    assert wide == tall == pytest.approx(4 * square, rel=0.05), "statistics and gradients stay"


def test_a_plan_refuses_ranks_that_training_would_refuse() -> None:
    with pytest.raises(ValueError, match="batch_size 64 does not divide over 3 ranks"):
        fit.figures(SMALL, Machine(3, 3, 1 << 50, 1 << 50))


@pytest.mark.parametrize("method", ["dense", "static"])
def test_the_column_of_a_method_is_the_same_in_the_plan_of_another(method: MethodName) -> None:
    planned = RunConfig(model=SMALL.model, data=SMALL.data, method=method)
    ours = replace(planned, method="sparse_offload")
    found = [planner_of(config).with_method("sparse_offload").memory(LARGE) for config in (planned, ours)]
    assert found[0] == found[1]


def test_a_control_of_given_widths_stands_beside_a_search_without() -> None:
    """Of trained weights, for instance, whose search draws masks: it is refused with these widths."""
    even = replace(SMALL, method="static", policy=PolicyConfig(search="sampled"))
    given = replace(even, static=StaticConfig("3 5 7 9 11 13"))
    found, wider = (fit.figures(config, LARGE)["beside"] for config in (given, even))
    assert found["static"]["device_bytes"] < wider["static"]["device_bytes"]
    assert found["sparse_offload"] == wider["sparse_offload"]


def test_a_method_whose_memory_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="only dense, static, sparse_offload runs are planned, not rigl"):
        fit.figures(replace(SMALL, method="rigl"), LARGE)


def test_a_network_that_takes_no_images_of_this_size_is_one_line() -> None:
    config = case("timm/vit_tiny_patch16_224", 64, 8, 0.25)
    with pytest.raises(ValueError, match=r"224 does not take 3 x 64 x 64 images \(.*\); set") as error:
        planner_of(config)
    assert "\n" not in str(error.value)


def test_half_precision_halves_what_convolutions_keep() -> None:
    planner = planner_of(SMALL)
    half = planner_of(replace(SMALL, train=replace(SMALL.train, precision="bf16")))
    machine = Machine(1, 1, 1 << 50, 1 << 50)
    full, less = planner.memory(machine, 1), half.memory(machine, 1)
    assert less.subnets == full.subnets
    assert less.activations < 0.8 * full.activations
    assert torch.get_default_dtype() == torch.float32


DECODER = RunConfig(
    data=DataConfig("text", batch_size=4, declared={"num_classes": 64, "tokens": 32, "train_images": 800}),
    model=ModelConfig(
        "offload_sparse/decoder",
        "internal",
        {"width": 32, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2},
    ),
    store=StoreConfig("file"),
    policy=PolicyConfig(rho=0.5),
)


@pytest.mark.usefixtures("_quiet")
def test_a_language_model_is_planned_by_its_tokens() -> None:
    planner = planner_of(DECODER)
    weights = sum(p.numel() for p in planner.structure.model.parameters())
    memory = planner.memory(LARGE)
    assert memory.files == 2 * 4 * weights, "with momentum"
    longer = replace(DECODER, data=replace(DECODER.data, declared=DECODER.data.declared | {"tokens": 256}))
    ratio = planner_of(longer).memory(LARGE).activations / memory.activations
    assert 7 < ratio < 9, "attention by its fused kernel keeps no scores: 8 times the tokens, not 64"
    assert fit.figures(DECODER, LARGE)["fits"]


def test_tokens_and_images_are_not_mistaken_for_each_other() -> None:
    images = replace(DECODER, data=SMALL.data)
    with pytest.raises(ValueError, match=r"reads tokens, .*data\.declared\.tokens"):
        planner_of(images)
    tokens = replace(SMALL, data=DECODER.data)
    with pytest.raises(ValueError, match=r"reads images; remove data\.declared\.tokens"):
        planner_of(tokens)
