"""Tensors of a subnet begin at multiples of 16 bytes; nothing that is saved knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offload_sparse import SparseOffload
from offload_sparse.engine import subnet_pair
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.session import Setup
from offload_sparse.engine.state import restore_small, small_state
from offload_sparse.engine.subnet_pair import Side
from tests.support.sessions import arrays, batches, loss_of
from tests.support.simulated_cuda import DEVICE, simulated_cuda

K = 4
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def network(first: int, second: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3), nn.ReLU()
        )
        return net.extend([nn.Flatten(), nn.Linear(4 * second, 4)]).to(dtype)


def session_of(
    widths: tuple[int, int] = (11, 7),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    optimizer: str = "sgd",
    rounds: RoundConfig | None = None,
) -> SparseOffload:
    return SparseOffload(
        partial(network, *widths, dtype),
        (torch.empty(2, 2, 6, 6, dtype=dtype),),
        OPTIMIZERS[optimizer],
        rho=0.5,
        rounds=rounds or RoundConfig(k=K),
        total_steps=100,
        seed=3,
        device=device,
        setup=Setup(dtype=dtype),
    )


def tensors_of(session: SparseOffload) -> Iterator[Tensor]:
    pair = session._open()
    for side in pair.active:
        yield from side.subnet.parameters
        yield from (value for _, _, value in side._held if value.is_floating_point())
    for gradients in pair.gradients.values():
        yield from gradients._places


def between(side: Side) -> Iterator[Tensor]:
    """What lies between the tensors of all arrays."""
    for kind, array in side.arrays.items():
        yield from (array[first : first + count] for first, count in side.narrow(kind).layout.gaps)


@contextmanager
def packed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_pair, "aligned", lambda _: 1)
        yield


@settings(max_examples=4)
@given(
    widths=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    simulated=st.booleans(),
)
def test_every_tensor_begins_at_a_multiple_of_16_bytes(
    widths: tuple[int, int], dtype: torch.dtype, simulated: bool
) -> None:
    """Parameters, their gradients and buffers of both subnets, whatever widths a round draws."""
    with simulated_cuda() if simulated else nullcontext():
        session = session_of(widths, dtype, DEVICE if simulated else "cpu")
        for _ in range(3):
            session._open()
            found = list(tensors_of(session))
            assert len(found) > 10
            assert [t.shape for t in found if t.storage_offset() * t.element_size() % 16] == []
            session.rounds_done += 1
            session._drop_round()
        session.transfers.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_tensors_one_after_the_other(optimizer: str) -> None:
    """But for roundings (vector instructions have others than what is left over), and what lies between
    tensors stays zero."""
    session = session_of(optimizer=optimizer)
    with packed():
        other = session_of(optimizer=optimizer)
        for batch in batches(3 * K + 1):
            other.step(loss_of(batch))
    gaps = 0
    for batch in batches(3 * K + 1):
        session.step(loss_of(batch))
        for side in session._open().active:
            gaps += sum(part.numel() for part in between(side))
            assert not any(part.any() for part in between(side))
    assert gaps > 0
    for kind, values in arrays(other).items():
        torch.testing.assert_close(arrays(session)[kind], values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(session.policy.s, other.policy.s, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sync", ["step", "round"])
def test_what_is_saved_in_the_middle_of_a_round_has_no_gaps(sync: str) -> None:
    """It is what a subnet without gaps saves, and either of them goes on from it."""
    found: list[dict[str, Tensor]] = []
    for context in (nullcontext(), packed()):
        with context:
            session = session_of(rounds=RoundConfig(k=K, sync=sync))  # type: ignore[arg-type]
            for batch in batches(K + 2):
                session.step(loss_of(batch))
            session.transfers.settle()
            state = small_state(session)
            found.append(dict(state.local))
            restore_small(session, state)
            session._open()
            torch.testing.assert_close(dict(small_state(session).local), found[-1], rtol=0, atol=0)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
