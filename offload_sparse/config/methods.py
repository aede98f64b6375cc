"""The branches of the configuration that belong to single methods."""

from __future__ import annotations

import re
from dataclasses import dataclass

from offload_sparse.channels.require import require


@dataclass
class StaticConfig:
    """The control ``static``: a narrow network, fixed from the start; and the start of a search by probes.

    Attributes:
        widths: atoms that each group keeps, such as ``[8, 8, 16, 16]`` or ``8 8 16 16``; or the name of
            published widths, which are scaled to ``policy.rho`` of ``policy.budget``
            (``policy.published_widths`` lists them with their sources). Empty keeps the same share of every
            group. ``policy.search`` ``probe`` begins with these widths, too, scaled to the budget, where it
            has time to move them; else, as with ``none``, they stay what they are."""

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
