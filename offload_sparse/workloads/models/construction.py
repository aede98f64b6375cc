"""How the networks in this room are constructed: initial weights and scaled widths."""

from __future__ import annotations

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw initial weights in place, module by module, in the order of ``module.modules()``.

    Convolutions are Kaiming-normal with fan-out (He et al. 2015), which keeps the variance of gradients
    through a ReLU network; the classifier starts near zero, so that the first loss is log(classes). Depends
    on no data and runs under ``torch.device("meta")``."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def scaled(channels: int, width: float) -> int:
    """``channels`` times the width multiplier, rounded, at least 1. Raises ValueError: ``width`` is not above
    0."""
    if not width > 0:
        raise ValueError(f"width is {width}; give a multiplier above 0, such as 0.5")
    return max(1, round(channels * width))
