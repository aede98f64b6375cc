"""MaskPolicy: the keep probabilities s of all atoms, the masks drawn from them, and how s is learned.

    sample(round) ──▶ m1, m2 ──▶ losses measured elsewhere ──▶ update(L(m1) - L(m2), m1, m2)
                                                                 estimate · precondition · optimizer step ·
                                                                 project

Everything is float64 on the CPU and a function of (configuration, seed, the loss differences seen so far):
ranks that pass the same loss differences hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.config import PolicyConfig
from offload_sparse.policy.estimators import ESTIMATORS, leave_one_out, precondition
from offload_sparse.policy.probabilities import project
from offload_sparse.policy.samplers import (
    mask_generator,
    minimum_size,
    most_probable,
    respect_size,
    respect_widths,
    uniforms,
)
from offload_sparse.structure.channel_map import Group

_STREAMS = {"m1": 0, "m2": 1, "candidates": 2, "ranks": 3}


class MaskPolicy:
    """p(m | s) over the masks of a network, with sum(s) <= rho * C at all times.

    s starts at rho everywhere and stays in [floor, 1 - floor]. With rho = 1 the policy is ``trivial``: s = 1,
    every mask keeps everything, nothing is learned. Minimum widths and the hard cap change a few drawn atoms
    after the fact; the estimators treat these masks as if they had been drawn from Bern(s), a bias that is
    small when groups are much wider than ``min_width`` and ``hard_cap`` is rarely reached.

    Args:
        config: rho, estimator, optimizer and bounds.
        groups: the groups of the atoms, covering 0 … C - 1 in order.
        seed: seed of the masks; equal on all ranks.
        size: parameters of the subnet of a mask, if the memory that they take is to be bounded, too.

    Attributes:
        size_cap: most parameters that the subnet of a mask has: hard_cap^2 times those of a network that
            keeps rho of every group, since a network narrowed by a factor shrinks by its square. More only
            where minimum widths demand it.
        cap: most atoms that a drawn mask keeps, ceil(hard_cap * rho * C) (at least the minimum widths, at
            most C).
        budget: rho * C, in atoms.

    Raises:
        ValueError: there are no groups.
    """

    def __init__(
        self,
        config: PolicyConfig,
        groups: Sequence[Group],
        seed: int,
        size: Callable[[Tensor], int] | None = None,
    ) -> None:
        if not groups:
            raise ValueError("there is nothing to sample: the model has no groups of channels")
        self.config = config
        self.groups = tuple(groups)
        self.seed = seed
        self.num_atoms = self.groups[-1].stop
        self.budget = config.rho * self.num_atoms
        self.cap = self._hard_cap()
        self._size = size
        self.size_cap = self._hard_size_cap()
        self._frozen = False
        start = torch.full((self.num_atoms,), float(config.rho), dtype=torch.float64)
        self._s = nn.Parameter(start if self.trivial else self._project(start))
        self._optimizer = self._build_optimizer()

    @property
    def s(self) -> Tensor:
        """The keep probabilities float64[C]; a read-only view by convention."""
        return self._s.detach()

    @property
    def trivial(self) -> bool:
        """Whether rho is 1, so that every mask keeps everything."""
        return self.config.rho == 1

    @property
    def frozen(self) -> bool:
        """Whether s is learned no more."""
        return self._frozen

    @property
    def expected_size(self) -> float:
        """Expected number of atoms of a raw draw, sum(s)."""
        return float(self.s.sum())

    @property
    def entropy(self) -> float:
        """Mean entropy of the Bernoulli variables, in bits per atom: 1 is undecided, 0 is decided."""
        s = self.s
        return float((torch.special.entr(s) + torch.special.entr(1 - s)).mean()) / math.log(2)

    def sample(self, round: int) -> tuple[Tensor, Tensor]:
        """m1 and its reference m2, two independent masks bool[C]; a function of (s, seed, round)."""
        return self._draw(round, _STREAMS["m1"]), self._draw(round, _STREAMS["m2"])

    def sample_for_ranks(self, round: int, ranks: int) -> tuple[Tensor, ...]:
        """m1 and a reference mask for each of ``ranks`` ranks, all independent; the first is that of
        ``sample``.
        """
        references = [self._draw(round, _STREAMS["m2"])]
        references += [self._draw(round, _STREAMS["ranks"] + rank) for rank in range(1, ranks)]
        return self._draw(round, _STREAMS["m1"]), *references

    def candidates(self, count: int) -> list[Tensor]:
        """Masks bool[C] to choose the final network from: the most probable one, then ``count`` drawn from
        p(m | s).

        Equal masks are listed once, so that no subnet is measured twice; the list may be shorter than 1 +
        count.
        """
        best = most_probable(self.s, self.groups, self.budget, self.config.min_width)
        masks = [self._fitting(best, 1 - self.s)]
        masks += [self._draw(index, _STREAMS["candidates"]) for index in range(count)]
        return list({mask.numpy().tobytes(): mask for mask in reversed(masks)}.values())[::-1]

    def update(self, loss_difference: float, m1: Tensor, m2: Tensor) -> None:
        """One step on s from the loss difference L(m1) - L(m2); a trivial or frozen policy stays as it is.

        Raises:
            FloatingPointError: the loss difference is not a finite number.
            ValueError: a mask is not bool[C].
        """
        if not math.isfinite(loss_difference):
            raise FloatingPointError(
                f"the loss difference L(m1) - L(m2) is {loss_difference}: the training diverged; "
                "lower optim.lr"
            )
        for mask in (m1, m2):
            if mask.dtype != torch.bool or mask.shape != (self.num_atoms,):
                raise ValueError(f"a mask is {mask.dtype}{list(mask.shape)}; give bool[{self.num_atoms}]")
        if not (self.trivial or self.frozen):
            self._move(ESTIMATORS[self.config.estimator](loss_difference, m1, m2, self.s))

    def update_from_ranks(self, losses: Tensor, masks: Tensor) -> None:
        """One step on s by leave-one-out over R + 1 masks.

        Args:
            losses: float64[R + 1].
            masks: bool[R + 1, C].
        """
        if not (self.trivial or self.frozen):
            self._move(leave_one_out(losses, masks, self.s))

    def _move(self, gradient: Tensor) -> None:
        self._s.grad = precondition(gradient, self.s, self.config.alpha)
        self._optimizer.step()
        self._s.grad = None
        with torch.no_grad():
            self._s.copy_(self._project(self.s))

    def freeze(self) -> None:
        """Stop learning s; masks can still be drawn."""
        self._frozen = True

    def state_dict(self) -> dict[str, Any]:
        """Copies of s, the optimizer's state and the frozen flag; configuration and seed are the caller's."""
        slots = self._optimizer.state[self._s]
        return {
            "s": self.s.clone(),
            "frozen": self._frozen,
            "optimizer": {name: value.clone() for name, value in slots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()`` bit for bit.

        Raises:
            ValueError: the state belongs to another number of atoms or to another optimizer.
        """
        s, slots = state["s"], state["optimizer"]
        if s.dtype != torch.float64 or s.shape != (self.num_atoms,):
            raise ValueError(
                f"the saved probabilities are {s.dtype}{list(s.shape)}, the model has {self.num_atoms} "
                "atoms; load a checkpoint of the same model"
            )
        mine = self._optimizer.state[self._s]
        if _shapes(slots) != _shapes(mine):
            raise ValueError(
                f"the saved optimizer state ({', '.join(slots) or 'none'}) does not fit policy.optimizer "
                f"{self.config.optimizer!r} ({', '.join(mine) or 'none'}); set the one of the checkpoint"
            )
        with torch.no_grad():
            self._s.copy_(s)
            for name, value in slots.items():
                mine[name].copy_(value)
        self._frozen = bool(state["frozen"])

    def _draw(self, round: int, stream: int) -> Tensor:
        u = uniforms(self.num_atoms, mask_generator(self.seed, round, stream))
        mask = respect_widths(u < self.s, self.s, self.groups, self.config.min_width, self.cap, u)
        return self._fitting(mask, u / self.s)

    def _fitting(self, mask: Tensor, margin: Tensor) -> Tensor:
        if self._size is None or self.trivial:
            return mask
        return respect_size(mask, margin, self.groups, self.config.min_width, self._size, self.size_cap)

    def _hard_size_cap(self) -> int:
        """Parameters at rho of every group, times hard_cap squared; those of the full network at most."""
        if self._size is None:
            return 0
        uniform = torch.zeros(self.num_atoms, dtype=torch.bool)
        for group in self.groups:
            width = min(group.size, max(self.config.min_width, math.ceil(self.config.rho * group.size)))
            uniform[group.start : group.start + width] = True
        whole = self._size(torch.ones_like(uniform))
        return min(whole, math.ceil(self.config.hard_cap**2 * self._size(uniform)))

    def _hard_cap(self) -> int:
        wanted = math.ceil(self.config.hard_cap * self.budget - 1e-9)
        return min(self.num_atoms, max(wanted, minimum_size(self.groups, self.config.min_width)))

    def _project(self, z: Tensor) -> Tensor:
        return project(z, self.budget, self.config.floor, 1 - self.config.floor)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Adam or SGD over s, with the state of its first step (zeros) already there.

        A state that exists from the start keeps the same keys and shapes for the whole run, which lets
        checkpoints be loaded in place; zeros are what both optimizers would start from.
        """
        config, zeros = self.config, torch.zeros_like(self.s)
        if config.optimizer == "adam":
            adam = torch.optim.Adam([self._s], lr=config.lr, foreach=False)
            adam.state[self._s] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            return adam
        sgd = torch.optim.SGD([self._s], lr=config.lr, momentum=config.momentum, foreach=False)
        if config.momentum > 0:
            sgd.state[self._s] = {"momentum_buffer": zeros}
        return sgd


def _shapes(slots: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in slots.items()}
