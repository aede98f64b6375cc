"""What to run first on a new card: no part stops the next, and without a card its own rows are empty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from offload_sparse.bench import gpu
from offload_sparse.channels.config import chosen_block
from offload_sparse.config.run import MethodName
from offload_sparse.engine.config import RoundConfig
from tests.support.simulated_cuda import DEVICE, simulated_cuda

CPU = torch.device("cpu")


class CompilationError(Exception):
    """As Triton's, which is of no other kind."""


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, CompilationError])
def test_a_part_that_fails_is_a_row_and_the_next_goes_on(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device, quick: bool) -> Iterator[gpu.Row]:
        yield "broken.first", 1.0, "before"
        raise error(f"CUDA error: on {device}, {quick}")

    def fine(device: torch.device, quick: bool) -> Iterator[gpu.Row]:
        del device, quick
        yield "fine.figure", None, "of a card"

    monkeypatch.setattr(gpu, "PARTS", (broken, fine))
    result = gpu.run(quick=True)
    assert [row[:2] for row in result.table] == [
        ["broken.first", 1.0],
        ["broken", "failed"],
        ["fine.figure", ""],
    ]
    assert result.ratios == {"gpu.broken.first": 1.0}
    assert "CUDA error" in result.raw["broken.failed"]


@pytest.mark.parametrize("part", [gpu.page_locking, gpu.copies])
def test_rows_of_a_card_are_empty_without_one(part: object) -> None:
    rows = list(part(CPU, True))  # type: ignore[operator]
    assert rows
    assert all(figure is None for _, figure, _ in rows)


@pytest.mark.parametrize("device", [CPU, DEVICE])
def test_the_engine_trains_the_same_network_on_every_device(device: torch.device) -> None:
    """With the bits of the CPU, where the device has them."""
    with simulated_cuda():
        assert [figure for _, figure, _ in gpu.engine(device, True)] == [0.0, 0.0]


def test_rounds_begin_with_single_channels_and_fit_their_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a card, too, where channels are taken in blocks unless something else is said."""
    blocks: list[object] = []

    def measured(factory: Any, *arguments: Any) -> tuple[list[float], list[float]]:
        *_, device, setup = arguments
        blocks.append(chosen_block(setup.block, device.type))
        gpu.measure.session_of(factory, (3, 32, 32), gpu.round.RHO, RoundConfig(), setup=setup)
        return [1.0], [1.0]

    monkeypatch.setattr(gpu.round, "measure", measured)
    with simulated_cuda():
        assert len(list(gpu.rounds(DEVICE, True))) == 2 * len(blocks)
    assert blocks == [1, 8, "<=16"]


def test_every_method_takes_steps() -> None:
    found = {key: figure for key, figure, _ in gpu.methods(CPU, True)}
    assert found == {f"methods.{name}.finite": 1.0 for name in get_args(MethodName)}
