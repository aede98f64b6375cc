"""``offload-sparse verify``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offload_sparse.channels.config import Residual
from offload_sparse.cli.table import show
from offload_sparse.config.parse import PROGRAM, Options


@dataclass
class VerifyConfig:
    """Check on a random mask that the narrow network equals the masked full network, in float64.

    Attributes:
        model: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        all: check a table of networks of many families instead; only ``rho``, ``seed`` and ``json`` count.
        rho: probability that a channel is kept, in (0, 1].
        residual: what is sampled on residual streams.
        image_size: side of the images in pixels; 0 takes 32 for networks of this package and 64 for others.
        in_channels: channels of the images; 0 takes 3.
        num_classes: outputs of the network.
        seed: seed of the mask and of the network's random weights.
        json: print one JSON object instead of a table.
    """

    model: str = ""
    all: bool = False
    rho: float = 0.5
    residual: Residual = "coupled"
    image_size: int = 0
    in_channels: int = 0
    num_classes: int = 10
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        if bool(self.model) == self.all:
            raise ValueError(
                "--model is missing; name one, or give --all"
                if not self.all
                else "--model and --all exclude each other; give one of them"
            )
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; give a ratio in (0, 1], such as 0.25")
        for name, least in (("image_size", 0), ("in_channels", 0), ("num_classes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give {least} or more")


_OPTIONS = Options(
    VerifyConfig,
    f"{PROGRAM} verify",
    (
        f"{PROGRAM} verify --model torchvision/resnet18 --rho 0.25",
        f"{PROGRAM} verify --model timm/mobilenetv1_100 --image_size 224 --json",
        f"{PROGRAM} verify --all",
    ),
)


def verify(argv: Sequence[str]) -> int:
    """Check that a model, narrowed, equals the full one with dropped channels masked; exit code 1 if not."""
    config = _OPTIONS.parse(argv)
    if config.all:
        return _verify_all(config)
    figures = _verify(config)
    show(figures, config.json)
    return 0 if figures["ok"] else 1


def _verify(config: VerifyConfig) -> dict[str, Any]:
    import torch

    from offload_sparse.channels.check import TOLERANCE
    from offload_sparse.channels.check import verify as compare
    from offload_sparse.channels.discovery import discover
    from offload_sparse.channels.subnet import build_on_meta
    from offload_sparse.workloads.models import build_model

    size = config.image_size or (32 if config.model.startswith("offload_sparse/") else 64)
    channels = config.in_channels or 3

    def build() -> Any:
        return build_model(config.model, config.num_classes, channels, size)

    start = time.perf_counter()
    model, inputs = build_on_meta(build), (torch.empty(2, channels, size, size, device="meta"),)
    channel_map = discover(model, inputs, config.residual)
    discover_seconds = time.perf_counter() - start
    result = compare(build, inputs, channel_map, config.rho, config.seed)
    return {
        "model": config.model,
        "rho": config.rho,
        "residual": config.residual,
        "atoms": result.atoms,
        "groups": len(channel_map.groups),
        "kept": result.kept,
        "output_error": max(result.train_error, result.eval_error),
        "gradient_error": result.gradient_error,
        "worst": result.worst,
        "discover_seconds": discover_seconds,
        "verify_seconds": result.seconds,
        "ok": bool(result.error <= TOLERANCE),  # NaN fails too
    }


def _verify_all(config: VerifyConfig) -> int:
    """The table of ``--all``; exit code 1 if a network that is known to pass does not."""
    from offload_sparse.inspect import coverage
    from offload_sparse.workloads.models import build_model

    def build(case: coverage.Case) -> Any:
        return build_model(case.name, num_classes=10, in_channels=3, image_size=case.size, **case.arguments)

    start, outcomes = time.perf_counter(), []
    if not config.json:
        print(_ROW.format("model", "streams", "atoms", "groups", "discover", "output", "gradient", ""))
    for outcome in coverage.cover(build, coverage.CASES, rho=config.rho, seed=config.seed):
        outcomes.append(outcome)
        if not config.json:
            print(_row(outcome), flush=True)
    accepted = sum(outcome.accepted for outcome in outcomes)
    summary = {
        "accepted": accepted,
        "refused": len(outcomes) - accepted,
        "ok": all(outcome.accepted for outcome in outcomes if outcome.case.accepted),
        "seconds": time.perf_counter() - start,
    }
    if config.json:
        show(summary | {"models": [outcome.figures() for outcome in outcomes]}, json_wanted=True)
    else:
        show(summary, json_wanted=False)
    return 0 if summary["ok"] else 1


_ROW = "{:<36}{:<10}{:>7}{:>8}{:>10}{:>10}{:>10}  {}"


def _row(outcome: Any) -> str:
    figures = outcome.figures()
    seconds = f"{outcome.discover_seconds:.1f} s"
    errors = ["" if figures[k] is None else f"{figures[k]:.0e}" for k in ("output_error", "gradient_error")]
    reason = f"refused: {outcome.reason}" if outcome.reason else ""
    return _ROW.format(
        outcome.case.name, outcome.residual, outcome.atoms, outcome.groups, seconds, *errors, reason
    )
