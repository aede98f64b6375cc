"""What is learned about the keep probabilities: one number per atom (s_c), or one per group (s_c = r_g(c)).

Before anything is trained the channels of a layer are exchangeable, and only the widths of layers can be
learned. Their rates r see the mean of the gradients of a group, in which what single atoms add by chance
cancels: a few numbers with a strong signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import MOMENTUM, PolicyConfig

_BETAS, _EPSILON = (0.9, 0.999), 1e-8

Values = NDArray[np.float64]


class Parametrisation:
    """The parameter, its optimizer, and the probabilities that it stands for, which start at ``s``
    (float64[C]).

    Attributes:
        values: the keep probabilities float64[C]."""

    def __init__(self, config: PolicyConfig, groups: Sequence[Group], s: Tensor) -> None:
        self._config = config
        atoms = config.parametrisation == "atom"  # each is then a group of its own
        self._name = "s" if atoms else "rates"
        counts = [1] * len(s) if atoms else [group.size for group in groups]
        self._counts, self._group_of = np.array(counts, np.float64), np.repeat(np.arange(len(counts)), counts)
        self.settle(s.numpy())
        # A state that exists from the start keeps the same keys and shapes for the whole run, which lets
        # checkpoints be loaded in place; zeros are what both optimizers would start from.
        zeros = torch.zeros(len(self._value), dtype=torch.float64)
        self._slots, self._momentum = {"momentum_buffer": zeros}, zeros.numpy()
        if config.optimizer == "adam":
            self._slots = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @property
    def s(self) -> Tensor:
        """The keep probabilities float64[C]."""
        return torch.from_numpy(self.values)

    def move(self, gradient: Values, where: NDArray[np.int64] | None = None) -> Values:
        """One optimizer step. Returns float64[C], where s would be without bounds and budget; tell ``settle``
        where it is with them.

        Args:
            gradient: float64[C], of the loss by s. A rate sees its mean over the group; by the chain rule it
                would be the sum, by which large groups would move more than small ones.
            where: the atoms that ``gradient`` is of, if not of all; it is 0 for the others."""
        step = self._adam if self._config.optimizer == "adam" else self._sgd
        return step(self._means(gradient, where))[self._group_of] + self._rounding

    def _sgd(self, g: Values) -> Values:
        """As ``torch.optim.SGD``, in a tenth of the time of its step on so few numbers."""
        self._momentum *= MOMENTUM
        self._momentum += g
        value = torch.from_numpy(self._value).add(self._slots["momentum_buffer"], alpha=-self._config.lr)
        return value.numpy()

    def _adam(self, gradient: Values) -> Values:
        """As ``torch.optim.Adam``."""
        g = torch.from_numpy(gradient)
        count, mean, square = self._slots["step"], self._slots["exp_avg"], self._slots["exp_avg_sq"]
        steps = float(count.add_(1))
        mean.lerp_(g, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        scale = (square.sqrt() / (1 - _BETAS[1] ** steps) ** 0.5).add_(_EPSILON)
        rate = -(self._config.lr / (1 - _BETAS[0] ** steps))
        return torch.from_numpy(self._value).addcdiv(mean, scale, value=rate).numpy()

    def settle(self, s: Values) -> None:
        """Go on from ``s``, float64[C], which is not changed from now on."""
        self.values, self._value = s, self._means(s)
        self._rounding = s - self._value[self._group_of]

    def slots(self) -> dict[str, Tensor]:
        """The optimizer's state by ``parameter.slot``."""
        return {f"{self._name}.{slot}": value for slot, value in self._slots.items()}

    def load(self, s: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Resume from ``s`` and ``slots``, bit for bit. Raises ValueError: the slots are those of another
        optimizer or parametrisation."""
        mine = self.slots()
        if {n: v.shape for n, v in slots.items()} != {n: v.shape for n, v in mine.items()}:
            raise ValueError(
                f"the saved optimizer state ({', '.join(slots) or 'none'}) does not fit policy.optimizer "
                f"{self._config.optimizer!r} and policy.parametrisation {self._config.parametrisation!r} "
                f"({', '.join(mine) or 'none'}); set those of the checkpoint"
            )
        for name, value in slots.items():
            mine[name].copy_(value)
        self.settle(s.clone().numpy())

    def _means(self, values: Values, where: NDArray[np.int64] | None = None) -> Values:
        """Means over the groups of values of the atoms ``where`` (None: of all), which are 0 for others."""
        of_groups = self._group_of if where is None else self._group_of[where]
        return np.bincount(of_groups, values, len(self._counts)) / self._counts
