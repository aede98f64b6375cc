"""A training loop of one's own, with a network and data that the package does not know."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from offload_sparse import Forward, SparseOffload, load_pruned
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.forward import Closure
from offload_sparse.policy.config import PolicyConfig

Batch = tuple[Tensor, Tensor]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Spectrogram(nn.Module):
    """A small network over one-dimensional signals: two convolutions, a residual sum, a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, width, 5, padding=2, bias=False), nn.BatchNorm1d(width))
        self.mix = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 3)

    def forward(self, signals: Tensor) -> Tensor:
        hidden = F.relu(self.stem(signals))
        hidden = F.relu(hidden + self.mix(hidden))
        return self.head(hidden.mean(dim=2))


@pytest.fixture(scope="module")
def signals() -> TensorDataset:
    """Sines of three frequencies in noise, with a random phase."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(192) % 3
    phase = torch.rand(192, 1, 1, generator=generator) * 6.28
    time = torch.linspace(0, 6.28, 32)
    waves = torch.sin(time * (1 + 3 * labels.view(-1, 1, 1)) + phase)
    return TensorDataset(waves + 0.3 * torch.randn(192, 2, 32, generator=generator), labels)


def loss_of(batch: Batch) -> Closure:
    return lambda network: F.cross_entropy(network(batch[0]), batch[1])


def accuracy(network: nn.Module, data: TensorDataset) -> float:
    inputs, labels = data.tensors
    with torch.no_grad():
        return float((network(inputs).argmax(1) == labels).float().mean())


def test_a_loop_of_ones_own_ends_with_a_narrow_network_that_has_learned(
    signals: TensorDataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    loader = DataLoader(signals, batch_size=32, shuffle=True)
    epochs = 12
    session = SparseOffload(
        Spectrogram,
        (torch.empty(1, 2, 32),),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        rho=0.5,
        total_steps=epochs * len(loader),
        rounds=RoundConfig(k=4, freeze_at=0.25),
    )
    for _ in range(epochs):
        for batch in loader:
            loss = session.step(loss_of(batch))
    final = session.finalize()

    assert loss.shape == ()
    full = sum(p.numel() for p in Spectrogram().parameters())
    assert sum(p.numel() for p in final.module.parameters()) < 0.6 * full
    assert accuracy(final.module, signals) > 0.9
    final.save(tmp_path)
    loaded = load_pruned(tmp_path, Spectrogram)
    inputs = signals.tensors[0]
    torch.testing.assert_close(loaded(inputs), final.module(inputs))


def test_a_session_works_inside_an_accelerator_that_the_user_has_made(signals: TensorDataset) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = accelerator.prepare(DataLoader(signals, batch_size=48))
    session = SparseOffload(
        Spectrogram(),
        (torch.empty(1, 2, 32),),
        SGD,
        rho=0.5,
        device=accelerator.device,
        forward=Forward(accelerator.autocast),
    )
    kinds = set()

    def watched(network: nn.Module, batch: Batch) -> Tensor:
        logits = network(batch[0])
        kinds.add(logits.dtype)
        return F.cross_entropy(logits, batch[1])

    steps = (partial(watched, batch=batch) for _ in range(3) for batch in loader)
    losses = [float(session.step(closure)) for closure in steps]
    assert kinds == {torch.bfloat16}, "the accelerator's precision is that of the session's passes"
    assert sum(losses[-3:]) < sum(losses[:3])
    network = accelerator.prepare(session.finalize().module)
    assert accelerator.unwrap_model(network)(torch.zeros(1, 2, 32)).shape == (1, 3)


def test_without_a_number_of_steps_the_user_says_when_the_mask_is_fixed(signals: TensorDataset) -> None:
    session = SparseOffload(Spectrogram, (torch.empty(1, 2, 32),), SGD, rho=0.5, rounds=RoundConfig(k=3))
    batches = [(signals.tensors[0][i::6], signals.tensors[1][i::6]) for i in range(6)]
    for batch in batches[:4]:
        session.step(loss_of(batch))
    session.freeze()
    assert not session.frozen, "the round that is open goes on"
    for batch in batches[4:]:
        session.step(loss_of(batch))
    session.step(loss_of(batches[0]))
    assert session.frozen
    chosen = session.final_mask
    assert chosen is not None
    assert torch.equal(session.finalize().mask, chosen)


def test_where_finalize_takes_its_statistics_from(
    signals: TensorDataset,
) -> None:
    """From the last batches of the training, or from those that it is given."""
    def trained() -> SparseOffload:
        session = SparseOffload(Spectrogram, (torch.empty(1, 2, 32),), SGD, rho=1.0)
        for i in range(4):
            session.step(loss_of((signals.tensors[0][i::4], signals.tensors[1][i::4])))
        return session

    own = trained().finalize().module
    same = trained().finalize(signals.tensors[0][i::4] for i in range(4)).module
    other = trained().finalize([signals.tensors[0][:8]]).module
    inputs = signals.tensors[0]
    torch.testing.assert_close(own(inputs), same(inputs))
    assert not torch.allclose(own(inputs), other(inputs))


def test_a_session_that_has_not_trained_needs_batches() -> None:
    session = SparseOffload(Spectrogram, (torch.empty(1, 2, 32),), SGD, rho=0.5)
    with pytest.raises(ValueError, match=r"need at least one batch.* give some to .*finalize\(\)"):
        session.finalize()


def test_rho_is_that_of_the_policy_if_both_are_given() -> None:
    session = SparseOffload(
        Spectrogram, (torch.empty(1, 2, 32),), SGD, policy=PolicyConfig(rho=0.5, lr=0.1), rho=0.25
    )
    assert (session.policy.config.rho, session.policy.config.lr) == (0.25, 0.1)
    with pytest.raises(ValueError, match="give a remaining ratio"):
        SparseOffload(Spectrogram, (torch.empty(1, 2, 32),), SGD, rho=1.5)
