"""The order of the images is a function of (seed, epoch, step) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from offload_sparse.workloads.data.order import (
    check_batch,
    global_batch,
    rank_part,
    seed_of,
    steps_per_epoch,
)

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.integers(0, 1000), st.integers(1, 60), st.integers(1, 20))
def test_the_batches_of_an_epoch_hold_no_image_twice(seed: int, epoch: int, size: int, batch: int) -> None:
    assume(size >= batch)
    batches = [global_batch(seed, epoch, step, size, batch) for step in range(size // batch)]
    indices = torch.cat(batches)
    assert indices.dtype == torch.int64
    assert all(len(part) == batch for part in batches)
    assert len(indices.unique()) == len(indices) == size - size % batch
    assert 0 <= int(indices.min()) <= int(indices.max()) < size


@given(SEEDS, st.integers(0, 5), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_parts_of_the_ranks_in_order_are_the_global_batch(seed: int, step: int, world_size: int) -> None:
    batch = global_batch(seed, 3, step, 100, 12)
    parts = [rank_part(batch, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), batch)
    assert {len(part) for part in parts} == {12 // world_size}


def test_an_earlier_batch_is_the_same_whatever_was_read_in_between() -> None:
    first = global_batch(1, 0, 2, 50, 5)
    for epoch in range(20):
        global_batch(1, epoch, 0, 50, 5)
    assert torch.equal(global_batch(1, 0, 2, 50, 5), first)


def test_changing_a_batch_in_place_does_not_change_the_next_reader() -> None:
    first = global_batch(1, 0, 0, 50, 5)
    kept = first.clone()
    first.zero_()
    assert torch.equal(global_batch(1, 0, 0, 50, 5), kept)


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = [global_batch(seed, epoch, 0, 1000, 1000) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 16


def test_torchs_global_generator_is_neither_read_nor_advanced() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = global_batch(17, 5, 0, 40, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    global_batch(18, 5, 0, 40, 8)
    assert torch.equal(global_batch(17, 5, 0, 40, 8), first)


def test_fewer_images_than_a_batch_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size is 8, but there are only 7 training images"):
        steps_per_epoch(7, 8)
    with pytest.raises(ValueError, match="only 7 training images"):
        global_batch(0, 0, 0, 7, 8)


@pytest.mark.parametrize(
    ("batch", "ranks", "advice"), [(10, 4, "to 8 or 12"), (3, 4, "to 4"), (256, 3, "to 255 or 258")]
)
def test_a_batch_that_does_not_divide_over_ranks_is_refused_with_advice(
    batch: int, ranks: int, advice: str
) -> None:
    with pytest.raises(ValueError, match=f"does not divide over {ranks} ranks.*{advice}"):
        check_batch(batch, ranks)
    check_batch(batch * ranks, ranks)


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_seeds_are_63_bit_and_repeatable(numbers: list[int]) -> None:
    assert 0 <= seed_of(*numbers) < 2**63
    assert seed_of(*numbers) == seed_of(*numbers)


def test_seeds_depend_on_every_number_and_on_their_order() -> None:
    seeds = {seed_of(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert len({seed_of(), seed_of(0), seed_of(0, 0)}) == 3


def test_seeds_follow_the_published_splitmix64() -> None:
    """The generator's first output for state 0 is 0xE220A8397B1DCDAF; seed_of() chains its finaliser."""
    mask = 2**64 - 1

    def splitmix(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert splitmix(0) == 0xE220A8397B1DCDAF
    assert seed_of(3, 5) == splitmix(splitmix(splitmix(3)) ^ splitmix(5)) >> 1
