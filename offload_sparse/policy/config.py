"""The branches of the configuration that belong to the search for a structure: the policy and its rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from offload_sparse.channels.require import require

EstimatorName = Literal["auto", "pge", "vr_pge", "rloo", "disarm", "rloo_cv", "disarm_cv", "bitflip"]
SamplerName = Literal["auto", "bernoulli", "persistent", "fixed_width"]
ParametrisationName = Literal["auto", "atom", "group", "hierarchical"]
BudgetName = Literal["count", "params", "flops"]

_FOR_BERNOULLI = ("disarm", "rloo_cv", "disarm_cv")
_FOR_FIXED_WIDTH = ("auto", "pge", "vr_pge", "rloo")


@dataclass
class PolicyConfig:
    """How channel masks are drawn and how their keep probabilities are learned.

    Attributes:
        rho: remaining ratio of what ``budget`` counts, in (0, 1]. With ``count`` it is the paper's: the sum
            of s is at most rho times the atoms (an atom is one channel unless ``atoms.block`` is larger).
        budget: what rho is a share of: ``count`` (atoms), ``params`` (parameters of the network) or ``flops``
            (its forward FLOPs). The last two are products of widths and are linearised at every step of s.
        rho_start: remaining ratio at the start of the search, which falls linearly to ``rho``; 0 starts at
            ``rho``. Buffers are sized for the larger one.
        anneal: share of the search after which ``rho`` is reached.
        estimator: gradient estimator of the keep probabilities (see ``policy.estimators``). ``disarm`` draws
            pairs of antithetic masks, ``bitflip`` flips one atom of the mask. ``auto`` is that of the least
            variance that the sampler allows: ``disarm_cv`` for ``bernoulli``, else ``rloo``.
        control_decay: decay, per round, of the comparisons that the control variate of ``rloo_cv`` and
            ``disarm_cv`` comes from.
        sampler: ``bernoulli`` draws every mask anew (paper), ``persistent`` redraws a share ``refresh`` of
            the atoms per round, ``fixed_width`` keeps the width of every group, so that shapes never change.
            ``auto`` is ``fixed_width`` for compiled runs, ``bernoulli`` for estimators that need it, else
            ``persistent``.
        refresh: share of the atoms that ``persistent`` redraws per round, in (0, 1].
        parametrisation: ``atom`` learns one probability per atom (paper); ``group`` learns a keep rate per
            group, the same for all of its atoms, that is how wide it should be; ``hierarchical`` learns such
            a rate and what single atoms deviate from it. ``auto`` is ``atom`` for fixed widths, else
            ``group``.
        group_lr: learning rate of the keep rates of ``group`` and ``hierarchical``.
        optimizer: optimizer of the keep probabilities.
        lr: learning rate of single atoms (the paper: Adam, 12e-3).
        schedule: how both learning rates change during the search: not at all, or down to 0 along a line or a
            cosine.
        momentum: momentum of ``sgd``.
        alpha: exponent of the preconditioner H = diag(s(1-s))^alpha.
        floor: keep probabilities stay in [floor, 1 - floor], since 0 and 1 are absorbing.
        min_width: atoms that every group keeps, whatever is drawn.
        hard_cap: a drawn mask never keeps more than hard_cap times the expected number of atoms (with
            ``count``), or has more than hard_cap^2 times the parameters (and FLOPs, if these are the budget)
            of the uniformly narrowed network.
    """

    rho: float = 0.25
    budget: BudgetName = "count"
    rho_start: float = 0.0
    anneal: float = 0.5
    estimator: EstimatorName = "auto"
    control_decay: float = 0.95
    sampler: SamplerName = "auto"
    refresh: float = 0.02
    parametrisation: ParametrisationName = "auto"
    group_lr: float = 0.01
    optimizer: Literal["adam", "sgd"] = "sgd"
    lr: float = 12e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    momentum: float = 0.9
    alpha: float = 0.5
    floor: float = 0.005
    min_width: int = 1
    hard_cap: float = 1.25

    def __post_init__(self) -> None:
        require(
            0 < self.rho <= 1, f"policy.rho is {self.rho}; give a remaining ratio in (0, 1], such as 0.25"
        )
        require(
            self.rho_start == 0 or self.rho <= self.rho_start < 1,
            f"policy.rho_start is {self.rho_start}; give a ratio in [policy.rho, 1), or 0 for none",
        )
        require(0 < self.anneal <= 1, f"policy.anneal is {self.anneal}; give a share in (0, 1]")
        for name in ("lr", "group_lr"):
            require(getattr(self, name) >= 0, f"policy.{name} is {getattr(self, name)}; give 0 or more")
        for name in ("momentum", "control_decay"):
            require(
                0 <= getattr(self, name) < 1,
                f"policy.{name} is {getattr(self, name)}; give a value in [0, 1)",
            )
        require(0 < self.refresh <= 1, f"policy.refresh is {self.refresh}; give a share in (0, 1]")
        require(0 <= self.alpha <= 1, f"policy.alpha is {self.alpha}; give a value in [0, 1]")
        require(0 <= self.floor < 0.5, f"policy.floor is {self.floor}; give a value in [0, 0.5)")
        require(
            self.floor <= self.rho,
            f"policy.floor {self.floor} is above policy.rho {self.rho}: no keep probability could meet the "
            "budget; lower policy.floor",
        )
        require(self.min_width >= 1, f"policy.min_width is {self.min_width}; give at least 1 atom")
        require(self.hard_cap >= 1, f"policy.hard_cap is {self.hard_cap}; give 1 or more")
        self._check_sampler()

    def _check_sampler(self) -> None:
        if self.sampler == "persistent":
            require(
                self.estimator not in _FOR_BERNOULLI,
                f"policy.estimator {self.estimator} needs masks that owe nothing to earlier ones; set it to "
                "rloo, or policy.sampler to bernoulli",
            )
        if self.sampler == "fixed_width":
            require(
                self.estimator in _FOR_FIXED_WIDTH,
                f"policy.estimator {self.estimator} needs atoms drawn independently; with policy.sampler "
                "fixed_width set it to rloo, vr_pge or pge",
            )
            require(
                self.parametrisation in ("auto", "atom") and self.rho_start == 0,
                "policy.sampler fixed_width never changes a width; set policy.parametrisation to atom and "
                "policy.rho_start to 0, or take another sampler",
            )

    @classmethod
    def paper(cls, **fields: Any) -> PolicyConfig:
        """Masks drawn anew in every round, a probability per atom, learned by Adam (Zhou et al. 2021), and
        these fields.
        """
        paper = {
            "sampler": "bernoulli",
            "estimator": "rloo",
            "parametrisation": "atom",
            "optimizer": "adam",
        }
        return cls(**(paper | fields))

    def resolved(self, compiled: bool) -> PolicyConfig:
        """The same with choices in the places of ``auto``.

        Raises:
            ValueError: the sampler does not go with another setting.
        """
        sampler, estimator, parametrisation = self.sampler, self.estimator, self.parametrisation
        if sampler == "auto":
            sampler = "bernoulli" if estimator in _FOR_BERNOULLI else "persistent"
            sampler = "fixed_width" if compiled else sampler
        if estimator == "auto":
            estimator = "disarm_cv" if sampler == "bernoulli" else "rloo"
        if parametrisation == "auto":
            parametrisation = "atom" if sampler == "fixed_width" else "group"
        return replace(self, sampler=sampler, estimator=estimator, parametrisation=parametrisation)
