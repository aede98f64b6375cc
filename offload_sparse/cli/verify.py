"""``offload-sparse verify``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offload_sparse.channels.config import Residual
from offload_sparse.cli.table import show
from offload_sparse.config.parse import PROGRAM, Options
from offload_sparse.run.terminal import fitted


@dataclass
class VerifyConfig:
    """Check on a random mask that the narrow network equals the masked full network, in float64.

    Attributes:
        model: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        all: check a table of networks of many families instead; only ``rho``, ``seed`` and ``json`` count.
        rho: probability that a channel is kept, in (0, 1].
        residual: what is sampled on residual streams.
        image_size: side of the images in pixels; 0 takes 32 for networks of this package and 64 for others.
        in_channels: channels of the images.
        num_classes: outputs of the network.
        seed: seed of the mask and of the network's random weights.
        json: print one JSON object instead of a table.
    """

    model: str = ""
    all: bool = False
    rho: float = 0.5
    residual: Residual = "coupled"
    image_size: int = 0
    in_channels: int = 3
    num_classes: int = 10
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        if bool(self.model) == self.all:
            both = "--model and --all exclude each other; give one of them"
            raise ValueError(both if self.all else "--model is missing; name one, or give --all")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; give a ratio in (0, 1], such as 0.25")
        for name, least in (("image_size", 0), ("in_channels", 1), ("num_classes", 1), ("seed", 0)):
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
    from offload_sparse.workloads.models import build_model, takes_tokens

    size = config.image_size or (32 if config.model.startswith("offload_sparse/") else 64)

    def build() -> Any:
        return build_model(config.model, config.num_classes, config.in_channels, size)

    start = time.perf_counter()
    model, inputs = build_on_meta(build), (torch.empty(2, config.in_channels, size, size, device="meta"),)
    if takes_tokens(config.model):
        inputs = (torch.arange(16).view(2, 8) % config.num_classes,)
    channel_map = discover(model, inputs, config.residual)
    found = time.perf_counter()
    result = compare(build(), inputs, channel_map, config.rho, config.seed)
    return {
        "model": config.model,
        "rho": config.rho,
        "residual": config.residual,
        "atoms": channel_map.num_atoms,
        "groups": len(channel_map.groups),
        "kept": result.kept,
        "output_error": result.output_error,
        "gradient_error": result.gradient_error,
        "worst": result.worst,
        "discover_seconds": found - start,
        "verify_seconds": time.perf_counter() - found,
        "ok": bool(result.error <= TOLERANCE),  # NaN fails too
    }


def _verify_all(config: VerifyConfig) -> int:
    """The table of ``--all``; exit code 1 if a network is refused with every policy."""
    from offload_sparse.inspect import coverage

    start, known = time.perf_counter(), {case.name for case in coverage.CASES}
    if not config.json:
        titles = ("model", "streams", "atoms", "groups", "search", "output", "gradient", "export")
        print(_ROW.format(*titles))
    rows: list[dict[str, Any]] = []
    for case in coverage.CASES:
        found = coverage.examine(case, rho=config.rho, seed=config.seed)
        rows += found
        for row in [] if config.json else found:
            print(_row(row), flush=True)
    accepted = {row["model"] for row in rows if row["accepted"]}
    differences = [row["export_difference"] for row in rows if row["export_difference"] is not None]
    summary = {
        "accepted": len(accepted),
        "refused": len(known) - len(accepted),
        "other_in_training": len({row["model"] for row in rows if row["modes_differ"]}),
        "worst_export_difference": max(differences, default=0.0),
        "ok": known <= accepted,
        "seconds": time.perf_counter() - start,
    }
    show(summary | ({"models": rows} if config.json else {}), config.json)
    return 0 if summary["ok"] else 1


_ROW = "{:<46}{:<9}{:>6}{:>7}{:>8}{:>7}{:>9}{:>7}"


def _row(figures: dict[str, Any]) -> str:
    seconds = f"{figures['discover_seconds']:.1f} s"
    keys = ("output_error", "gradient_error", "export_difference")
    errors = ["" if figures[key] is None else f"{figures[key]:.0e}" for key in keys]
    note = "other in training" if figures["modes_differ"] else ""
    note = f"refused: {figures['reason']}" if figures["reason"] else note
    about = (figures[key] for key in ("model", "residual", "atoms", "groups"))
    row = _ROW.format(*about, seconds, *errors)
    return f"{row}\n{fitted(f'    {note}')}" if note else row
