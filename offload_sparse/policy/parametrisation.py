"""What is learned about the keep probabilities: one number per atom (s_c), or one per group (s_c = r_g(c)).

Before anything is trained the channels of a layer are exchangeable, and only the widths of layers can be
learned. Their rates r see the mean of the gradients of a group, in which what single atoms add by chance
cancels: a few numbers with a strong signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import MOMENTUM, PolicyConfig


class Parametrisation:
    """The parameter, its optimizer, and the probabilities that it stands for.

    Args:
        config: parametrisation, optimizer and learning rate.
        groups: the groups of the atoms.
        s: float64[C], where to start.
    """

    def __init__(self, config: PolicyConfig, groups: Sequence[Group], s: Tensor) -> None:
        self._config = config
        sizes = torch.tensor([group.size for group in groups])
        self._group_of = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        self._sizes = sizes.to(torch.float64)
        self._name = "s" if config.parametrisation == "atom" else "rates"
        self._parameter = nn.Parameter(self._reduced(s).clone())
        self._optimizer = self._build_optimizer()
        self.settle(s)

    @property
    def s(self) -> Tensor:
        """The keep probabilities float64[C]."""
        return self._s

    def move(self, gradient: Tensor) -> Tensor:
        """One optimizer step.

        Args:
            gradient: float64[C], of the loss by s. A rate sees its mean over the group; by the chain rule it
                would be the sum, by which large groups would move more than small ones.

        Returns:
            float64[C], where s would be without bounds and budget; tell ``settle`` where it is with them.
        """
        self._parameter.grad = self._reduced(gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = self._parameter.detach()
        return value if self._name == "s" else value[self._group_of] + self._rounding

    def settle(self, s: Tensor) -> None:
        """Go on from ``s``."""
        self._s = s.clone()
        with torch.no_grad():
            self._parameter.copy_(self._reduced(s))
        if self._name == "rates":
            self._rounding = s - self._parameter.detach()[self._group_of]

    def slots(self) -> dict[str, Tensor]:
        """The optimizer's state by ``parameter.slot``."""
        state = self._optimizer.state[self._parameter]
        return {f"{self._name}.{slot}": value for slot, value in state.items()}

    def load(self, s: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Resume from ``s`` and ``slots``, bit for bit.

        Raises:
            ValueError: the slots are those of another optimizer or parametrisation.
        """
        mine = self.slots()
        if {n: v.shape for n, v in slots.items()} != {n: v.shape for n, v in mine.items()}:
            raise ValueError(
                f"the saved optimizer state ({', '.join(slots) or 'none'}) does not fit policy.optimizer "
                f"{self._config.optimizer!r} and policy.parametrisation {self._config.parametrisation!r} "
                f"({', '.join(mine) or 'none'}); set those of the checkpoint"
            )
        with torch.no_grad():
            for name, value in slots.items():
                mine[name].copy_(value)
        self.settle(s)

    def _reduced(self, values: Tensor) -> Tensor:
        """float64[C] as it is, or its means over groups."""
        if self._name == "s":
            return values
        return torch.zeros_like(self._sizes).index_add(0, self._group_of, values) / self._sizes

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Adam or SGD, with the state of its first step (zeros) already there.

        A state that exists from the start keeps the same keys and shapes for the whole run, which lets
        checkpoints be loaded in place; zeros are what both optimizers would start from.
        """
        zeros = torch.zeros_like(self._parameter, requires_grad=False)
        if self._config.optimizer == "adam":
            adam = torch.optim.Adam([self._parameter], lr=self._config.lr, foreach=False)
            slots = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            adam.state[self._parameter] = slots
            return adam
        sgd = torch.optim.SGD([self._parameter], lr=self._config.lr, momentum=MOMENTUM, foreach=False)
        sgd.state[self._parameter] = {"momentum_buffer": zeros}
        return sgd
