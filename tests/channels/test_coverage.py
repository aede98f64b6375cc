"""The table of networks: each is accepted with small errors, or refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.channels.check import TOLERANCE
from offload_sparse.inspect import coverage
from offload_sparse.inspect.coverage import CASES, Case, examine


def up_to(last: str, names: Sequence[str]) -> Sequence[str]:
    return names[: names.index(last) + 1]


def network(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 5, 1))


def test_the_table_is_wide() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40
    families = "vgg resnet resnext wide_resnet densenet googlenet inception mobilenet_v2 mobilenet_v3"
    families += " mobilenetv1 efficientnet regnet mnasnet squeezenet convnext vit swin shufflenet maxvit"
    families += " Llama Mistral Qwen2 Qwen3 Phi3 Gemma GPT2 GPTNeoX Bert Roberta ViT DeiT"
    families += " StableLm Cohere Starcoder2 PhiFor Bloom Mpt GPTBigCode Falcon OPT Electra"
    for family in families.split():
        assert any(family in name for name in names), family


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("offload_sparse/vgg_small", "coupled"),
        ("torchvision/squeezenet1_1", "coupled"),
        ("timm/convnext_atto", "coupled"),
        ("transformers/GPT2LMHeadModel", "internal"),
        ("transformers/FalconForCausalLM", "internal"),  # places counted from the end
    ],
)
def test_a_listed_network_is_accepted(name: str, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this policy, and not with those before it; what comes after is not tried here."""
    (case,) = (case for case in CASES if case.name == name)
    if "convnext" in name:
        case = replace(case, arguments=case.arguments | {"depths": (1, 1, 1, 1)})
    policies = coverage.policies
    monkeypatch.setattr(coverage, "policies", lambda *about: up_to(residual, policies(*about)))
    figures = next(row for row in examine(case) if row["accepted"])
    assert figures["residual"] == residual
    assert max(figures["output_error"], figures["gradient_error"]) < TOLERANCE
    assert figures["export_difference"] < 1e-5


def test_a_refusal_gives_its_reason_and_the_table_goes_on() -> None:
    def broken(case: Case) -> nn.Module:
        if case.name == "no constructor":
            raise KeyError("depth")
        middle = {"sigmoid": nn.Sigmoid(), "reorders": nn.ChannelShuffle(2), "fine": nn.ReLU()}
        return network(middle[case.name])

    names = ("no constructor", "sigmoid", "reorders", "fine")
    rows = [examine(Case(name, 8), broken)[0] for name in names]
    assert [row["accepted"] for row in rows] == [False, False, False, True]
    assert "KeyError: 'depth'" in rows[0]["reason"]
    assert "a function with f(0) != 0" in rows[1]["reason"]
    assert all("\n" not in row["reason"] for row in rows)


def test_buffers_that_are_read_keep_their_values() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([1, 0]))
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return x[self.order] * self.scale

    def indexed(case: Case) -> nn.Module:
        return nn.Sequential(network(nn.ReLU()), Indexed())

    assert examine(Case("indexed", 8), indexed)[0]["accepted"]
    assert not coverage.lacks_values(indexed(CASES[0]))
    assert coverage.lacks_values(indexed(CASES[0]).to("meta"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_case_is_accepted(case: Case) -> None:
    rows = examine(case)
    assert any(row["accepted"] for row in rows), rows[0]["reason"]
