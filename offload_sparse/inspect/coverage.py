"""Which networks can be trained: a table of many families, each discovered, verified, exported and read back.

    case ──▶ build on meta ──▶ with each policy: discover ──▶ slice = mask ──▶ save, read back ──▶ outcome

A network is accepted with a policy when slice = mask holds to ``TOLERANCE`` in float64 (on a narrow twin
where it is large), and the narrow network gives the same outputs after another process has read it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import TOLERANCE, Verification, lacks_values, random_mask, reduced, verify
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover, policies
from offload_sparse.channels.model_call import Inputs, modes_differ, move_inputs
from offload_sparse.channels.subnet import build_on_meta, hollow_copy, narrow_module
from offload_sparse.export.network_file import FinalNetwork

_TWIN_PARAMETERS = 500_000


@dataclass(frozen=True)
class Case:
    """One network of the table.

    Attributes:
        name: as ``offload_sparse.workloads.models.build_model`` takes it, or ``transformers/<class>``.
        size: side of the images, about the smallest that the family admits; 0 for a network on tokens.
        arguments: further arguments of its constructor or, for ``transformers``, of its configuration.
    """

    name: str
    size: int = 64
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a case with one residual policy.

    Attributes:
        case: the case.
        residual: the policy.
        groups, atoms: of the map, 0 when there is none.
        discover_seconds: building on meta and discovery.
        seconds: everything.
        verification: the errors, when it came to that.
        reason: why the network is refused; empty for an accepted one.
        export_difference: largest relative difference of what was read back.
        modes_differ: whether the network computes something else in training mode.
    """

    case: Case
    residual: Residual
    groups: int
    atoms: int
    discover_seconds: float
    seconds: float
    verification: Verification | None
    reason: str
    export_difference: float | None = None
    modes_differ: bool = False

    @property
    def accepted(self) -> bool:
        return not self.reason

    def figures(self) -> dict[str, object]:
        """The row of the table, errors as largest relative differences."""
        found = self.verification
        return {
            "model": self.case.name,
            "image_size": self.case.size,
            "accepted": self.accepted,
            "residual": self.residual,
            "atoms": self.atoms,
            "groups": self.groups,
            "output_error": max(found.train_error, found.eval_error) if found else None,
            "gradient_error": found.gradient_error if found else None,
            "export_difference": self.export_difference,
            "modes_differ": self.modes_differ,
            "discover_seconds": self.discover_seconds,
            "seconds": self.seconds,
            "reason": self.reason,
        }


_DECODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "use_cache": False,
}
_DECODER |= {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_ENCODER: dict[str, Any] = {
    key: n for key, n in _DECODER.items() if key not in ("num_key_value_heads", "use_cache")
}
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
_VISION |= {"image_size": 32, "patch_size": 8}
_GPT2: dict[str, Any] = {
    "vocab_size": 50,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 32,
    "use_cache": False,
}

_FALCON: dict[str, Any] = {
    key: n for key, n in _ENCODER.items() if key not in ("max_position_embeddings", "intermediate_size")
}
_FALCON |= {"ffn_hidden_size": 80, "use_cache": False}


def _cases(family: str, names: str, size: int = 64, **arguments: Any) -> tuple[Case, ...]:
    return tuple(Case(f"{family}/{name}", size, arguments) for name in names.split())


CASES: tuple[Case, ...] = (
    *_cases("offload_sparse", "vgg_small vgg16_cifar resnet20_cifar wrn28_10_cifar", 32),
    *_cases("torchvision", "alexnet vgg11_bn resnet18 resnet50 wide_resnet50_2 densenet121 googlenet"),
    *_cases("torchvision", "inception_v3", 75),
    *_cases("torchvision", "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0", 32),
    *_cases("torchvision", "mnasnet1_0 squeezenet1_1 convnext_tiny", 32),
    *_cases("timm", "resnet26d resnet50d resnetv2_50 seresnet18 seresnet50 dla34 darknet53 gernet_s"),
    *_cases("timm", "mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small", 32),
    *_cases("timm", "efficientnet_b0 efficientnet_lite0 mnasnet_100 fbnetc_100 tinynet_a", 32),
    *_cases("timm", "hardcorenas_a lcnet_050 rexnet_100 mobileone_s0 repvgg_a0 vgg11_bn", 32),
    *_cases("timm", "hrnet_w18_small selecsls42b ese_vovnet19b_dw"),
    *_cases("timm", "convnext_atto", 32),
    *_cases("torchvision", "resnext50_32x4d regnet_x_400mf regnet_y_400mf"),
    *_cases("timm", "regnetx_002 resnext26ts", 32),
    *_cases("torchvision", "vit_b_16 swin_t", 32),
    *_cases("timm", "maxvit_pico_rw_256", img_size=64),
    *_cases("timm", "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 mixer_s32_224", 32, img_size=32),
    *_cases("timm", "swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4),
    *_cases("torchvision", "shufflenet_v2_x1_0", 64),
    *_cases("timm", "ghostnet_100 skresnet18 dpn68 cspresnet50 res2net50_26w_4s", 64),
    *_cases(
        "transformers", "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Phi3ForCausalLM", 0, **_DECODER
    ),
    *_cases("transformers", "Qwen3ForCausalLM GemmaForCausalLM", 0, **_DECODER, head_dim=8),
    *_cases("transformers", "GPT2LMHeadModel", 0, **_GPT2),
    *_cases("transformers", "GPTNeoXForCausalLM BertForSequenceClassification", 0, **_ENCODER),
    *_cases("transformers", "RobertaForSequenceClassification", 0, **_ENCODER),
    *_cases("transformers", "ViTForImageClassification DeiTForImageClassification", 32, **_VISION),
    *_cases(
        "transformers",
        "StableLmForCausalLM CohereForCausalLM Starcoder2ForCausalLM PhiForCausalLM",
        0,
        **_DECODER,
    ),
    *_cases(
        "transformers",
        "BloomForCausalLM",
        0,
        vocab_size=50,
        hidden_size=48,
        n_layer=2,
        n_head=6,
        use_cache=False,
    ),
    *_cases(
        "transformers", "MptForCausalLM", 0, vocab_size=50, d_model=48, n_layers=2, n_heads=6, use_cache=False
    ),
    *_cases("transformers", "GPTBigCodeForCausalLM", 0, **_GPT2),
    *_cases("transformers", "FalconForCausalLM", 0, **_FALCON),
    *_cases("transformers", "OPTForCausalLM", 0, **_ENCODER, ffn_dim=80),
    *_cases("transformers", "ElectraForSequenceClassification", 0, **_ENCODER, embedding_size=48),
)
"""The networks of ``offload-sparse verify --all``; each is accepted with some policy."""


def build(case: Case) -> nn.Module:
    """The network of a case, with ten classes if it is one for images.

    Raises:
        ImportError: it is of ``transformers``, which is not installed.
    """
    family, _, name = case.name.partition("/")
    if family == "transformers":
        import transformers

        network: Any = getattr(transformers, name)
        built: nn.Module = network(network.config_class(**case.arguments))
        return built
    from offload_sparse.workloads.models import build_model

    return build_model(case.name, num_classes=10, in_channels=3, image_size=case.size, **case.arguments)


def examine(
    case: Case, build: Callable[[Case], nn.Module] = build, rho: float = 0.5, seed: int = 0
) -> list[Outcome]:
    """What becomes of one network with each residual policy that makes a difference for it; nothing that it
    does is an error here.

    Args:
        case: the network.
        build: builds it.
        rho: probability that an atom is kept.
        seed: seed of masks, parameters and inputs.
    """
    start = time.perf_counter()
    inputs = _inputs(case)
    try:
        model = build_on_meta(lambda: build(case))
        model = build(case) if lacks_values(model) else model
        possible = policies(model, inputs)
        differ = modes_differ(hollow_copy(model), move_inputs(inputs, "cpu"))
    except Exception as error:  # whatever a constructor or a forward raises is the reason
        return [_refusal(case, "coupled", start, error)]
    attempt = partial(_attempt, case, build, model, inputs, differ, rho, seed)
    return [attempt(residual) for residual in possible]


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    if case.size:
        return (torch.empty(2, 3, case.size, case.size, device="meta"),)
    return (torch.randint(2, 50, (2, 7), generator=generator),)


def _attempt(
    case: Case,
    build: Callable[[Case], nn.Module],
    model: nn.Module,
    inputs: Inputs,
    differ: bool,
    rho: float,
    seed: int,
    residual: Residual,
) -> Outcome:
    start = time.perf_counter()
    try:
        channel_map = discover(model, inputs, residual)
        discover_seconds = time.perf_counter() - start
        twin, twin_map = reduced(model, channel_map, _TWIN_PARAMETERS)
        found = verify(twin, inputs, twin_map, rho, seed)
        if not found.error <= TOLERANCE:  # NaN fails too
            raise ValueError(f"slice differs from mask: {found.worst}")
        difference = _read_back(case, build, inputs, channel_map, rho, seed)
    except Exception as error:  # a foreign network may raise anything while it runs
        return _refusal(case, residual, start, error, differ)
    seconds = time.perf_counter() - start
    sizes = (len(channel_map.groups), channel_map.num_atoms)
    return Outcome(case, residual, *sizes, discover_seconds, seconds, found, "", difference, differ)


def _read_back(
    case: Case,
    build: Callable[[Case], nn.Module],
    inputs: Inputs,
    channel_map: ChannelMap,
    rho: float,
    seed: int,
) -> float:
    """The difference between a narrow network and what another process reads of it."""
    torch.manual_seed(seed)
    mask = random_mask(channel_map, rho, torch.Generator().manual_seed(seed))
    narrow = narrow_module(build(case), channel_map, mask).eval()
    final = FinalNetwork(narrow, mask, channel_map, partial(build, case), inputs)
    with tempfile.TemporaryDirectory() as folder:
        return final.save(folder)


def _refusal(case: Case, residual: Residual, start: float, error: Exception, differ: bool = False) -> Outcome:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}"
    seconds = time.perf_counter() - start
    return Outcome(case, residual, 0, 0, seconds, seconds, None, reason, modes_differ=differ)
