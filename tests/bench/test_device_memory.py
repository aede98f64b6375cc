"""What a device would hold is what compute touches while it is alive."""

from __future__ import annotations

import torch

from offload_sparse.bench.device_memory import TouchedStorages, touched_peak

KIB = torch.float32.itemsize * 256
"""Bytes of ``torch.zeros(256)``."""


def test_a_tensor_counts_once_however_many_views_touch_it() -> None:
    whole = torch.zeros(4, 256)
    assert touched_peak(lambda: [row.add_(1) for row in whole], None, ()) == 4 * KIB


def test_what_was_freed_before_does_not_count() -> None:
    def compute() -> None:
        for _ in range(5):
            torch.zeros(256)

    assert touched_peak(compute, None, ()) == KIB


def test_backward_passes_are_seen() -> None:
    weight = torch.ones(256, requires_grad=True)
    with TouchedStorages() as mode:
        (weight * 2.0).sum().backward()
    assert mode.peak() >= 2 * KIB  # the weight and its gradient


def test_a_storage_counts_with_the_size_that_it_has_at_the_time() -> None:
    buffer = torch.zeros(256)

    def compute() -> None:
        buffer.add_(1)
        buffer.untyped_storage().resize_(0)
        torch.zeros(256)

    assert touched_peak(compute, None, ()) == KIB


def test_what_the_host_updates_is_on_the_host_unless_it_is_said_to_stay() -> None:
    shard, weight = torch.zeros(256), torch.zeros(256)

    def compute() -> None:
        weight.add_(shard)

    def update() -> None:
        shard.add_(1)
        weight.copy_(shard)

    assert touched_peak(compute, update, (weight,)) == KIB
    assert touched_peak(compute, update, ()) == 0
    assert touched_peak(compute, None, ()) == 2 * KIB
    assert touched_peak(compute, None, (), (shard,)) == KIB
