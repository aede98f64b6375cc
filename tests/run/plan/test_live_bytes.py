"""Counting the memory of a computation by the lives of its storages."""

from __future__ import annotations

import torch

from offload_sparse.run.plan.live_bytes import LiveBytes


def test_a_storage_counts_while_somebody_refers_to_it() -> None:
    x = torch.empty(100, device="meta")
    with LiveBytes() as counter:
        y = x + 1
        assert counter.live == 400
        view = y[:10]
        del y
        assert counter.live == 400
        del view
        assert (counter.live, counter.peak) == (0, 400)


def test_what_was_there_before_does_not_count_nor_does_work_in_place() -> None:
    x = torch.empty(100, device="meta")
    with LiveBytes() as counter:
        x.mul_(2).add_(1)
        assert x.view(10, 10).sum().numel() == 1
        assert counter.peak == 4


def test_autograd_keeps_what_the_backward_pass_needs_and_gives_it_back() -> None:
    x = torch.empty(100, device="meta", requires_grad=True)
    x.grad = torch.empty(100, device="meta")
    with LiveBytes() as counter:
        loss = x.exp().sin().sum()
        assert counter.live == 400 + 4  # what exp gave is kept; what sin gave nobody needs
        loss.backward()
        del loss
        assert counter.live <= 4
        assert counter.peak >= 800
