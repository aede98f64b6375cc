"""The decoder loses whole heads and hidden channels, and looks at no token that is still to come."""

from __future__ import annotations

import json

import pytest
import torch

from offload_sparse.channels.discovery import discover
from offload_sparse.cli.main import main
from offload_sparse.workloads.models import build_model, takes_tokens

NAME = "offload_sparse/decoder"
SMALL = {"width": 32, "hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2}


def test_a_token_is_predicted_from_those_before_it() -> None:
    model = build_model(NAME, 11, **SMALL).double()
    tokens = torch.arange(12).view(2, 6) % 11
    logits = model(tokens)
    assert logits.shape == (2, 6, 11)
    changed = tokens.clone()
    changed[:, 4:] += 1
    other = model(changed % 11)
    assert torch.equal(logits[:, :4], other[:, :4])
    assert not torch.equal(logits[:, 4:], other[:, 4:])


def test_what_is_dropped_are_heads_with_their_readers_and_hidden_channels() -> None:
    model = build_model(NAME, 11, **SMALL)
    channel_map = discover(model, (torch.zeros(1, 6, dtype=torch.int64),), "internal")
    assert sorted(group.size for group in channel_map.groups) == [2, 2, 24, 24]


def test_narrow_equals_masked_in_float64(capsys: pytest.CaptureFixture[str]) -> None:
    assert takes_tokens(NAME)
    assert main(["verify", "--model", NAME, "--num_classes", "13", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ok"]
    assert max(figures["output_error"], figures["gradient_error"]) < 1e-10


def test_sizes_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(ValueError, match="width 32, heads 4, kv_heads 3: each must divide"):
        build_model(NAME, 11, **SMALL | {"kv_heads": 3})
