"""What is learned about the keep probabilities: one number per atom, or one per group and what atoms deviate.

    atom           s_c
    group          s_c = r_g(c)
    hierarchical   s_c = r_g(c) + d_c, where the d of a group sum to 0

Before anything is trained the channels of a layer are exchangeable, and only the widths of layers can be
learned. Their rates r see the mean of the gradients of a group, in which what single atoms add by chance
cancels: a few numbers with a strong signal, at a learning rate of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from offload_sparse.channels.channel_map import Group
from offload_sparse.policy.config import PolicyConfig


class Parametrisation:
    """Parameters, their optimizer, and the probabilities that they stand for.

    Args:
        config: parametrisation, optimizer and learning rates.
        groups: the groups of the atoms.
        s: float64[C], where to start.
    """

    def __init__(self, config: PolicyConfig, groups: Sequence[Group], s: Tensor) -> None:
        self._config = config
        sizes = torch.tensor([group.size for group in groups])
        self._group_of = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        self._sizes = sizes.to(torch.float64)
        self._s = s.clone()
        if config.parametrisation == "atom":
            self._parameters = {"s": nn.Parameter(s.clone())}
            self._rates = {"s": config.lr}
        else:
            rates, offsets = self._split(s)
            self._parameters = {"rates": nn.Parameter(rates), "offsets": nn.Parameter(offsets)}
            of_offsets = 0.0 if config.parametrisation == "group" else config.lr
            self._rates = {"rates": config.group_lr, "offsets": of_offsets}
        self._optimizer = self._build_optimizer()

    @property
    def s(self) -> Tensor:
        """The keep probabilities float64[C]."""
        return self._s

    def move(self, gradient: Tensor, factor: float) -> Tensor:
        """One optimizer step.

        Args:
            gradient: float64[C], of the loss by s.
            factor: of the learning rates.

        Returns:
            float64[C], where s would be without bounds and budget; tell ``settle`` where it is with them.
        """
        for name, gradient_of in self._gradients(gradient).items():
            self._parameters[name].grad = gradient_of
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self._rates[group["name"]]
        self._optimizer.step()
        self._optimizer.zero_grad()
        values = {name: parameter.detach() for name, parameter in self._parameters.items()}
        if "s" in values:
            return values["s"]
        return values["rates"][self._group_of] + values["offsets"]

    def settle(self, s: Tensor) -> None:
        """Carry on from ``s``."""
        self._s = s.clone()
        parts = [s] if "s" in self._parameters else self._split(s)
        with torch.no_grad():
            for parameter, value in zip(self._parameters.values(), parts, strict=True):
                parameter.copy_(value)

    def slots(self) -> dict[str, Tensor]:
        """The optimizer's state by ``parameter.slot``."""
        return {
            f"{name}.{slot}": value
            for name, parameter in self._parameters.items()
            for slot, value in self._optimizer.state[parameter].items()
        }

    def load(self, s: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Carry on from ``s`` and ``slots``, bit for bit.

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

    def _split(self, s: Tensor) -> tuple[Tensor, Tensor]:
        rates = self._summed(s) / self._sizes
        return rates, s - rates[self._group_of]

    def _summed(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self._sizes), dtype=values.dtype).index_add(0, self._group_of, values)

    def _gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradient's projections on what rates and deviations can do.

        By the chain rule that on a rate is the sum over its group, not the mean: large groups would move by
        their size more than small ones.
        """
        if "s" in self._parameters:
            return {"s": gradient}
        rates, offsets = self._split(gradient)
        return {"rates": rates, "offsets": offsets}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Adam or SGD, with the state of its first step (zeros) already there.

        A state that exists from the start keeps the same keys and shapes for the whole run, which lets
        checkpoints be loaded in place; zeros are what both optimizers would start from.
        """
        groups = [
            {"params": [p], "lr": self._rates[name], "name": name} for name, p in self._parameters.items()
        ]
        if self._config.optimizer == "adam":
            adam = torch.optim.Adam(groups, foreach=False)
            for p in self._parameters.values():
                zeros = torch.zeros_like(p)
                adam.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": zeros,
                    "exp_avg_sq": zeros.clone(),
                }
            return adam
        sgd = torch.optim.SGD(groups, momentum=self._config.momentum, foreach=False)
        if self._config.momentum > 0:
            for p in self._parameters.values():
                sgd.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        return sgd
