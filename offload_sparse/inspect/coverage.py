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

from offload_sparse.channels.check import check, lacks_values, random_mask, reduced
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover, policies
from offload_sparse.channels.model_call import Inputs, modes_differ, move_inputs
from offload_sparse.channels.subnet import build_on_meta, hollow_copy, narrow_module
from offload_sparse.export.network_file import FinalNetwork

_TWIN_PARAMETERS = 500_000

Row = dict[str, Any]
"""What became of a case with one residual policy: errors are largest relative differences (None where it did
not come to that), ``export_difference`` that of what was read back, ``modes_differ`` whether the network
computes something else in training mode, ``discover_seconds`` those of discovery, ``seconds`` those of
everything, ``reason`` why it is refused (empty for an accepted one)."""


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


_DECODER: dict[str, Any] = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "use_cache": False}
_DECODER |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
_DECODER |= {"max_position_embeddings": 32, "pad_token_id": 0}
_ENCODER = {key: n for key, n in _DECODER.items() if key not in ("num_key_value_heads", "use_cache")}
_FALCON = {k: n for k, n in _ENCODER.items() if k not in ("max_position_embeddings", "intermediate_size")}
_FALCON |= {"ffn_hidden_size": 80, "use_cache": False}
_VISION: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 6, "image_size": 32, "patch_size": 8}
_GPT2 = {"vocab_size": 50, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 32, "use_cache": False}


def _cases(family: str, names: str, size: int = 64, **arguments: Any) -> tuple[Case, ...]:
    return tuple(Case(f"{family}/{name}", size, arguments) for name in names.split())


def _tokens(names: str, **arguments: Any) -> tuple[Case, ...]:
    return _cases("transformers", names, 0, **arguments)

CASES: tuple[Case, ...] = (
    *_cases("offload_sparse", "vgg_small vgg16_cifar resnet20_cifar wrn28_10_cifar", 32),
    *_cases("torchvision", "alexnet vgg11_bn resnet18 resnet50 wide_resnet50_2 densenet121 googlenet"),
    *_cases("torchvision", "inception_v3", 75),
    *_cases("torchvision", "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0", 32),
    *_cases("torchvision", "mnasnet1_0 squeezenet1_1 convnext_tiny", 32),
    *_cases("timm", "resnet26d resnet50d resnet50_gn resnetv2_50 seresnet18 seresnet50 dla34"),
    *_cases("timm", "mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small", 32),
    *_cases("timm", "efficientnet_b0 efficientnet_lite0 mnasnet_100 fbnetc_100 tinynet_a", 32),
    *_cases("timm", "hardcorenas_a lcnet_050 rexnet_100 mobileone_s0 repvgg_a0 vgg11_bn", 32),
    *_cases("timm", "darknet53 gernet_s hrnet_w18_small selecsls42b ese_vovnet19b_dw"),
    *_cases("timm", "convnext_atto", 32),
    *_cases("torchvision", "resnext50_32x4d regnet_x_400mf regnet_y_400mf"),
    *_cases("timm", "regnetx_002 resnext26ts", 32),
    *_cases("torchvision", "vit_b_16 swin_t", 32),
    *_cases("timm", "maxvit_pico_rw_256", img_size=64),
    *_cases("timm", "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 mixer_s32_224", 32, img_size=32),
    *_cases("timm", "swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4),
    *_cases("torchvision", "shufflenet_v2_x1_0", 64),
    *_cases("timm", "ghostnet_100 skresnet18 dpn68 cspresnet50 res2net50_26w_4s", 64),
    *_tokens("LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Phi3ForCausalLM", **_DECODER),
    *_tokens("Qwen3ForCausalLM GemmaForCausalLM", **_DECODER, head_dim=8),
    *_tokens("GPT2LMHeadModel", **_GPT2),
    *_tokens("GPTNeoXForCausalLM BertForSequenceClassification", **_ENCODER),
    *_tokens("RobertaForSequenceClassification", **_ENCODER),
    *_cases("transformers", "ViTForImageClassification DeiTForImageClassification", 32, **_VISION),
    *_tokens("StableLmForCausalLM CohereForCausalLM Starcoder2ForCausalLM PhiForCausalLM", **_DECODER),
    *_tokens("BloomForCausalLM", vocab_size=50, hidden_size=48, n_layer=2, n_head=6, use_cache=False),
    *_tokens("MptForCausalLM", vocab_size=50, d_model=48, n_layers=2, n_heads=6, use_cache=False),
    *_tokens("GPTBigCodeForCausalLM", **_GPT2),
    *_tokens("FalconForCausalLM", **_FALCON),
    *_tokens("OPTForCausalLM", **_ENCODER, ffn_dim=80),
    *_tokens("ElectraForSequenceClassification", **_ENCODER, embedding_size=48),
)
"""The networks of ``offload-sparse verify --all``; each is accepted with some policy."""


def build(case: Case) -> nn.Module:
    """The network of a case, with ten classes if it is one for images. Raises ImportError: it is of
    ``transformers``, which is not installed."""
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
) -> list[Row]:
    """What becomes of one network, which ``build`` makes, with each residual policy that makes a difference
    for it; nothing that it does is an error here. ``rho`` and ``seed`` are those of the masks."""
    start, differ = time.perf_counter(), False
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = (torch.randint(2, 50, (2, 7), generator=generator),)
    if case.size:
        inputs = (torch.empty(2, 3, case.size, case.size, device="meta"),)
    try:
        model = build_on_meta(lambda: build(case))
        model = build(case) if lacks_values(model) else model
        possible = policies(model, inputs)
        differ = modes_differ(hollow_copy(model), move_inputs(inputs, "cpu"))
    except Exception as error:  # whatever a constructor or a forward raises is the reason
        return [_row(case, "coupled", start, differ, _reason(error))]
    rows = []
    for residual in possible:
        start = time.perf_counter()
        try:
            found = _examined(partial(build, case), model, inputs, residual, rho, seed)
            rows.append(_row(case, residual, start, differ, **found))
        except Exception as error:  # a foreign network may raise anything while it runs
            rows.append(_row(case, residual, start, differ, _reason(error)))
    return rows


def _examined(
    build: Callable[[], nn.Module],
    model: nn.Module,
    inputs: Inputs,
    residual: Residual,
    rho: float,
    seed: int,
) -> Row:
    """What is found out about a network that is accepted."""
    start = time.perf_counter()
    channel_map = discover(model, inputs, residual)
    discover_seconds = time.perf_counter() - start
    twin, twin_map = reduced(model, channel_map, _TWIN_PARAMETERS)
    found = check(twin, inputs, twin_map, rho, seed)
    torch.manual_seed(seed)
    mask = random_mask(channel_map, rho, torch.Generator().manual_seed(seed))
    narrow = narrow_module(build(), channel_map, mask).eval()
    final = FinalNetwork(narrow, mask, channel_map, build, inputs)
    with tempfile.TemporaryDirectory() as folder:
        difference = final.save(folder)
    return {
        "atoms": channel_map.num_atoms,
        "groups": len(channel_map.groups),
        "output_error": found.output_error,
        "gradient_error": found.gradient_error,
        "export_difference": difference,
        "discover_seconds": discover_seconds,
    }


def _row(case: Case, residual: Residual, start: float, differ: bool, reason: str = "", **found: Any) -> Row:
    seconds = time.perf_counter() - start
    return {
        "model": case.name,
        "image_size": case.size,
        "accepted": not reason,
        "residual": residual,
        "atoms": 0,
        "groups": 0,
        **dict.fromkeys(("output_error", "gradient_error", "export_difference")),
        "modes_differ": differ,
        "discover_seconds": seconds,
        "seconds": seconds,
        "reason": reason,
    } | found


def _reason(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
