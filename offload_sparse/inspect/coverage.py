"""Which networks can be trained: a table of many families, each discovered and verified.

    case ──▶ build on meta ──▶ discover, coupled, else internal ──▶ narrow twin ──▶ verify ──▶ outcome

A network is accepted when slice = mask holds to ``TOLERANCE`` in float64; otherwise the outcome tells why it
is refused. Large networks are verified as their narrow twin, so the table takes minutes on one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.check import TOLERANCE, Verification, lacks_values, reduced, verify
from offload_sparse.channels.config import Residual
from offload_sparse.channels.discovery import discover, policies
from offload_sparse.channels.subnet import build_on_meta

TIME_LIMIT = 15.0
"""Seconds that the discovery of one network may take, over both residual policies."""

_TWIN_PARAMETERS = 500_000


@dataclass(frozen=True)
class Case:
    """One network of the table.

    Attributes:
        name: as ``offload_sparse.workloads.models.build_model`` takes it.
        size: side of the images, about the smallest that the family admits.
        accepted: whether the network is known to pass; a refusal then is a regression.
        arguments: further arguments of its constructor.
    """

    name: str
    size: int = 64
    accepted: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: the case.
        residual: residual policy that was taken; that of the last attempt for a refusal.
        groups: groups of the map, 0 when there is none.
        atoms: atoms of the map, 0 when there is none.
        discover_seconds: building on meta and discovery.
        seconds: everything.
        verification: the errors, when it came to that.
        reason: why the network is refused; empty for an accepted one.
    """

    case: Case
    residual: Residual
    groups: int
    atoms: int
    discover_seconds: float
    seconds: float
    verification: Verification | None
    reason: str

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
            "discover_seconds": self.discover_seconds,
            "seconds": self.seconds,
            "reason": self.reason,
        }


def _cases(
    family: str, names: str, size: int = 64, accepted: bool = True, **arguments: Any
) -> tuple[Case, ...]:
    return tuple(Case(f"{family}/{name}", size, accepted, arguments) for name in names.split())


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
    *_cases("torchvision", "shufflenet_v2_x1_0", 64, False),
    *_cases("timm", "ghostnet_100 skresnet18 res2net50_26w_4s dpn68 cspresnet50", 64, False),
)
"""The networks of ``offload-sparse verify --all``."""


def cover(
    build: Callable[[Case], nn.Module],
    cases: Sequence[Case],
    rho: float = 0.5,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
) -> Iterator[Outcome]:
    """The outcome of each case, one after the other; nothing that a network does ends the table.

    Args:
        build: builds the network of a case.
        cases: which networks.
        rho: probability that an atom is kept.
        seed: seed of masks, parameters and inputs.
        time_limit: seconds that the discovery of one network may take.
    """
    for case in cases:
        yield examine(case, build, rho, seed, time_limit)


def examine(
    case: Case,
    build: Callable[[Case], nn.Module],
    rho: float = 0.5,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
) -> Outcome:
    """Discover and verify one network, with coupled streams if they can be, else with dense ones."""
    start = time.perf_counter()
    try:
        model = build_on_meta(lambda: build(case))
        model = build(case) if lacks_values(model) else model
        inputs = (torch.empty(2, 3, case.size, case.size, device="meta"),)
        on_tokens = policies(model, inputs, time_limit) == ("internal",)
    except Exception as error:  # whatever a constructor or a forward raises is the reason
        return _refusal(case, "coupled", start, error)
    if on_tokens:
        return _attempt(case, "internal", model, inputs, start, (rho, seed, time_limit))
    outcome = _attempt(case, "coupled", model, inputs, start, (rho, seed, time_limit))
    remaining = time_limit - (time.perf_counter() - start)
    if outcome.accepted or remaining <= 0:
        return outcome
    dense = _attempt(case, "internal", model, inputs, start, (rho, seed, remaining))
    return dense if dense.accepted else outcome


def _attempt(
    case: Case,
    residual: Residual,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    start: float,
    settings: tuple[float, int, float],
) -> Outcome:
    rho, seed, time_limit = settings
    try:
        channel_map = discover(model, inputs, residual, time_limit)
        discover_seconds = time.perf_counter() - start
        twin, twin_map = reduced(model, channel_map, _TWIN_PARAMETERS)
        found = verify(twin, inputs, twin_map, rho, seed)
    except Exception as error:  # a foreign network may raise anything while it runs
        return _refusal(case, residual, start, error)
    reason = "" if found.error <= TOLERANCE else f"slice differs from mask: {found.worst}"  # NaN fails too
    return Outcome(
        case,
        residual,
        len(channel_map.groups),
        channel_map.num_atoms,
        discover_seconds,
        time.perf_counter() - start,
        found,
        reason,
    )


def _refusal(case: Case, residual: Residual, start: float, error: Exception) -> Outcome:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}"
    seconds = time.perf_counter() - start
    return Outcome(case, residual, 0, 0, seconds, seconds, None, reason)
