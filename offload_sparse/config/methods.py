"""The branches of the configuration that belong to single methods."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from offload_sparse.channels.require import require


@dataclass
class StaticConfig:
    """The control ``static``: a narrow network, fixed from the start.

    Attributes:
        widths: atoms that each group keeps, such as ``[8, 8, 16, 16]`` or ``8 8 16 16``; or the name of
            published widths, which are scaled to ``policy.rho`` of ``policy.budget``
            (``policy.published_widths`` lists them with their sources). Empty keeps the same share of every
            group."""

    widths: list[int] | str = ""

    def __post_init__(self) -> None:
        if isinstance(self.widths, list):
            self.widths = " ".join(map(str, self.widths))
        require(
            re.fullmatch(r"[\d\s,]*|[^\W\d][\w-]*", self.widths) is not None,
            f"static.widths is {self.widths!r}; give widths such as 8 8 16, or the name of published ones",
        )


@dataclass
class DSTConfig:
    """The method ``dst`` (Liu et al. 2020): weights masked by trainable thresholds.

    Attributes:
        alpha: factor of the penalty that raises the thresholds, of ``dfbst`` too (the papers: 5e-4 on MNIST,
            5e-6 on CIFAR)."""

    alpha: float = 5e-4

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"dst.alpha is {self.alpha}; give 0 or more")


@dataclass
class DFBSTConfig:
    """The method ``dfbst`` (Pote et al. 2023): trained masks on weights and on gradients.

    Attributes:
        beta: factor of the standard deviation of the masked gradients, which trains their thresholds."""

    beta: float = 0.01

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"dfbst.beta is {self.beta}; give 0 or more")


@dataclass
class RigLConfig:
    """The method ``rigl`` (Evci et al. 2020): drop by magnitude, grow by gradient. ``policy.rho`` is the
    share of the weights that is kept."""

    interval: ClassVar[int] = 100
    """Steps between replacements."""
    fraction: ClassVar[float] = 0.3
    """Share of a layer's weights that the first replacement would take."""
    stop: ClassVar[float] = 0.75
    """Share of the steps after which nothing is replaced any more."""


@dataclass
class GrowEfficientConfig:
    """The method ``grow_efficient`` (Yuan et al. 2021): trained gates on channels, dense backward passes.

    The goal is ``policy.rho``, the share of channels that is to remain; ``round.freeze_at`` is the share of
    the steps after which the gates stand still."""

    start: ClassVar[float] = 0.5
    """Probability that a channel is open at the start, in (0, 1)."""
    gate_lr: ClassVar[float] = 0.1
    """Learning rate of the gates (SGD without momentum)."""
    sharpness: ClassVar[float] = 200.0
    """The gates' temperature rises geometrically from 1 to this factor."""
    penalty: ClassVar[float] = 1.0
    """Factor of the distance between the open share and ``policy.rho``."""
