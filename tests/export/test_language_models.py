"""A decoder with tied layers and sizes in its code is trained, written and read back as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from offload_sparse import SparseOffload, load_pruned
from tests.support.language_models import WORDS, FusedAttention, LanguageModel, SlicedAttention

TOKENS = torch.randint(0, WORDS, (4, 8), generator=torch.Generator().manual_seed(0))


def fused() -> nn.Module:
    return LanguageModel(partial(FusedAttention, 24, 6, True))


def sliced() -> nn.Module:
    return LanguageModel(partial(SlicedAttention, 24, 6, 3))


@pytest.mark.parametrize("build", [fused, sliced])
def test_a_decoder_is_read_back_with_its_heads_and_ties(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Into another network it is refused."""
    torch.manual_seed(0)
    session = SparseOffload(build, (TOKENS,), partial(torch.optim.AdamW, lr=3e-3), rho=0.5, total_steps=6)
    for _ in range(6):
        session.step(
            lambda network: functional.cross_entropy(network(TOKENS).flatten(0, 1), TOKENS.flatten())
        )
    final = session.finalize()
    assert 0 < int(final.mask.sum()) < len(final.mask)
    final.save(tmp_path / "model")
    read = load_pruned(tmp_path / "model", build)
    assert read.head.weight is read.wte.weight
    tokens = torch.randint(0, WORDS, (3, 11))
    assert torch.equal(read(tokens), final.module(tokens))
    with pytest.raises(ValueError, match="was it exported from another model"):
        load_pruned(tmp_path / "model", lambda: nn.Sequential(nn.Embedding(WORDS, 24), nn.Linear(24, WORDS)))
