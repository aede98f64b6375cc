"""The branches of the configuration that belong to single methods, and the figures that a run aims at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from offload_sparse.channels.require import require


@dataclass
class StaticConfig:
    """The control ``static``: a narrow network, fixed from the start.

    Attributes:
        flops_ratio: its share of the dense network's FLOPs; 0 takes the share of a network that keeps
            ``policy.rho`` of every group.
        widths: atoms that each group keeps, in the order of the groups, instead of the same share of all;
            empty for the same share.
    """

    flops_ratio: float = 0.0
    widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            self.flops_ratio == 0 or not self.widths,
            "static.flops_ratio and static.widths exclude each other; give one of them",
        )
        require(
            0 <= self.flops_ratio <= 1, f"static.flops_ratio is {self.flops_ratio}; give a value in [0, 1]"
        )


@dataclass
class DSTConfig:
    """The method ``dst`` (Liu et al. 2020): weights masked by trainable thresholds.

    Attributes:
        alpha: factor of the penalty that raises the thresholds (the paper: 5e-4 on MNIST, 5e-6 on CIFAR).
        reset_at: remaining share of a layer at which its thresholds start anew, and all of it is back; 0 for
            never.
    """

    alpha: float = 5e-4
    reset_at: float = 0.01

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"dst.alpha is {self.alpha}; give 0 or more")
        _check_reset("dst", self.reset_at)


@dataclass
class DFBSTConfig:
    """The method ``dfbst`` (Pote et al. 2023): trained masks on weights and on gradients.

    Attributes:
        alpha: factor of the penalty that raises the thresholds of the weights.
        beta: factor of the standard deviation of the masked gradients, which trains their thresholds.
        reset_at: remaining share of a layer at which the thresholds of its weights start anew; 0 never.
    """

    alpha: float = 5e-4
    beta: float = 0.01
    reset_at: float = DSTConfig.reset_at

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            require(getattr(self, name) >= 0, f"dfbst.{name} is {getattr(self, name)}; give 0 or more")
        _check_reset("dfbst", self.reset_at)


@dataclass
class RigLConfig:
    """The method ``rigl`` (Evci et al. 2020): drop by magnitude, grow by gradient.

    Attributes:
        density: share of the weights that is kept, in (0, 1].
        distribution: densities of the layers; ``uniform`` keeps the first layer dense.
        interval: steps between replacements.
        fraction: share of a layer's weights that the first replacement would take.
        stop: share of the steps after which nothing is replaced any more.
    """

    density: float = 0.1
    distribution: Literal["erk", "uniform"] = "erk"
    interval: int = 100
    fraction: float = 0.3
    stop: float = 0.75

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"rigl.density is {self.density}; give a share in (0, 1]")
        require(self.interval >= 1, f"rigl.interval is {self.interval}; give at least 1 step")
        for name in ("fraction", "stop"):
            require(
                0 <= getattr(self, name) <= 1, f"rigl.{name} is {getattr(self, name)}; give a share in [0, 1]"
            )


@dataclass
class GrowEfficientConfig:
    """The method ``grow_efficient`` (Yuan et al. 2021): trained gates on channels, dense backward passes.

    The goal is ``policy.rho``, the share of channels that is to remain; ``round.freeze_at`` is the share of
    the steps after which the gates stand still.

    Attributes:
        start: probability that a channel is open at the start, in (0, 1).
        penalty: factor of the distance between the open share and ``policy.rho``.
        gate_lr: learning rate of the gates (SGD without momentum).
        sharpness: the gates' temperature rises geometrically from 1 to this factor.
    """

    start: float = 0.5
    penalty: float = 1.0
    gate_lr: float = 0.1
    sharpness: float = 200.0

    def __post_init__(self) -> None:
        require(0 < self.start < 1, f"grow_efficient.start is {self.start}; give a probability in (0, 1)")
        for name in ("penalty", "gate_lr"):
            require(
                getattr(self, name) >= 0, f"grow_efficient.{name} is {getattr(self, name)}; give 0 or more"
            )
        require(
            self.sharpness >= 1, f"grow_efficient.sharpness is {self.sharpness}; give a factor of at least 1"
        )


@dataclass
class PaperConfig:
    """The published figures that a run aims at; 0 where the text gives none.

    Attributes:
        source: paper, and its table or figure.
        accuracy: accuracy in %.
        dense_accuracy: accuracy of the dense network in %.
        params: remaining parameters in %.
        flops: remaining FLOPs in %.
        train_cost_saving: how many times cheaper than dense training.
    """

    source: str = ""
    accuracy: float = 0.0
    dense_accuracy: float = 0.0
    params: float = 0.0
    flops: float = 0.0
    train_cost_saving: float = 0.0

    def __post_init__(self) -> None:
        for name in ("accuracy", "dense_accuracy", "params", "flops"):
            require(
                0 <= getattr(self, name) <= 100,
                f"paper.{name} is {getattr(self, name)}; give a percentage, or 0 for none",
            )
        require(
            self.train_cost_saving >= 0,
            f"paper.train_cost_saving is {self.train_cost_saving}; give a factor, or 0 for none",
        )


def _check_reset(branch: str, share: float) -> None:
    require(0 <= share < 1, f"{branch}.reset_at is {share}; give a share in [0, 1), 0 for never")
