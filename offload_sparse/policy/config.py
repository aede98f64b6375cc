"""How masks are drawn and how their keep probabilities are learned: the options of ``policy``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar, Literal

from offload_sparse.channels.require import require

EstimatorName = Literal["auto", "pge", "vr_pge", "rloo", "disarm_cv"]
SamplerName = Literal["auto", "bernoulli", "persistent", "fixed_width"]
ParametrisationName = Literal["auto", "atom", "group"]
BudgetName = Literal["count", "params", "flops"]
StartName = Literal["auto", "uniform", "l1", "l2", "norm_scale", "random"]
SearchName = Literal["auto", "sampled", "forward", "probe", "none"]

ALPHA = 0.5
"""Exponent of the preconditioner H = diag(s(1-s))^α (the paper's)."""

MOMENTUM = 0.9
"""Of ``sgd`` on the keep probabilities."""

_FLOOR = 0.005


@dataclass
class PolicyConfig:
    """How channel masks are drawn and how their keep probabilities are learned.

    Attributes:
        rho: remaining ratio of what ``budget`` counts, in (0, 1]. With ``count`` it is the paper's: the sum
            of s is at most rho times the atoms (an atom is one channel unless ``atoms.block`` is larger).
        budgets: shares, as rho is one, of the members of a family of networks: the final phase trains the
            largest of them, the others as parts of it with norms of their own (see ``engine.family``). Needs
            ``search`` ``probe`` or ``none``, whose widths are those of rho. Empty trains the network of rho.
        budget: what rho is a share of: ``count`` (atoms), ``params`` (parameters of the network) or ``flops``
            (its forward FLOPs). The last two are products of widths and are linearised at every step of s.
        search: how the structure is found. ``sampled`` draws masks from keep probabilities that it learns
            (the paper); ``forward`` does so for weights that are trained already: the first half of the
            search are pairs of forward passes, and nothing is trained; ``probe`` trains one mask in cycles
            and moves its widths after each by pairs of forward passes (see ``policy.width_search``), with
            ``count`` at the FLOPs of even widths; ``none`` keeps one even mask. What follows, up to ``lr``,
            is of ``sampled`` and ``forward``. ``auto`` is ``probe``, for weights that are trained already
            ``none``, or ``sampled`` in the cases that offload_sparse/policy/README.md lists.
        start: which channels are the most probable ones, or the first mask: ``uniform`` tells none apart, as
            fresh weights do not; of weights to start from those with the largest norm of their filters
            (``l1``, ``l2``), or that norm times the scale of their BatchNorm (``norm_scale``). ``static``
            keeps just these: a one-shot cut. ``random`` is its control. With ``auto`` it is
            ``norm_scale`` for weights that are trained already, else ``uniform``.
        estimator: gradient estimator of the keep probabilities (see ``policy.estimators``). ``disarm_cv``
            draws pairs of antithetic masks. ``auto`` is that of the least variance that the sampler allows:
            ``disarm_cv`` for ``bernoulli``, else ``rloo``.
        sampler: ``bernoulli`` draws every mask anew (paper), ``persistent`` redraws 2 % of the atoms per
            round, ``fixed_width`` keeps the width of every group, so that shapes never change. ``auto`` is
            ``fixed_width`` for compiled runs and ``forward`` (unless ``parametrisation`` is ``group``),
            ``bernoulli`` for ``disarm_cv``, else ``persistent``.
        parametrisation: ``atom`` learns one probability per atom (paper); ``group`` learns a keep rate per
            group, the same for all of its atoms, that is how wide it should be. ``auto`` is ``atom`` for
            fixed widths, else ``group``.
        optimizer: optimizer of the keep probabilities (or keep rates).
        lr: its learning rate (the paper: Adam, 12e-3).
        hard_cap: a drawn mask never keeps more than hard_cap times the expected number of atoms (with
            ``count``), or has more than hard_cap^2 times the parameters (and FLOPs, if these are the budget)
            of the uniformly narrowed network.
    """

    refresh: ClassVar[float] = 0.02
    """Share of the atoms that ``persistent`` redraws per round, in (0, 1]."""

    cycle_steps: ClassVar[int] = 800
    """Fewest steps of a cycle of ``probe`` where there are several: a network that has not settled says what
    trains soonest. Cycles of 877 steps found VGG-19's widths, those of 329 bad ones for ResNet-20."""

    search_steps: ClassVar[int] = 6400
    """Steps of ``probe`` that are enough: its four cycles have 1,600 each. What is left trains what was
    found."""

    least_steps: ClassVar[int] = 150
    """Fewest steps of the only cycle of a short run. In the quickstart channels were worth less than nothing
    after 93 steps, and something in all layers after 187."""

    rho: float = 0.25
    budgets: list[float] = field(default_factory=list)
    budget: BudgetName = "count"
    search: SearchName = "auto"
    start: StartName = "auto"
    estimator: EstimatorName = "auto"
    sampler: SamplerName = "auto"
    parametrisation: ParametrisationName = "auto"
    optimizer: Literal["adam", "sgd"] = "sgd"
    lr: float = 0.01
    hard_cap: float = 1.25

    def __post_init__(self) -> None:
        require(
            0 < self.rho <= 1, f"policy.rho is {self.rho}; give a remaining ratio in (0, 1], such as 0.25"
        )
        require(
            all(0 < share <= 1 for share in self.budgets) and len(set(self.budgets)) == len(self.budgets),
            f"policy.budgets is {self.budgets}; give different ratios in (0, 1], such as [0.06, 0.25]",
        )
        require(
            not self.budgets or self.search in ("auto", "probe", "none"),
            "policy.budgets makes a family around one mask; set policy.search to probe or none",
        )
        require(0 <= self.lr < inf, f"policy.lr is {self.lr}; give 0 or more")
        require(self.hard_cap >= 1, f"policy.hard_cap is {self.hard_cap}; give 1 or more")
        require(
            self.sampler in ("auto", "bernoulli") or self.estimator != "disarm_cv",
            "policy.estimator disarm_cv needs antithetic masks; set it to rloo, or policy.sampler to "
            "bernoulli",
        )
        require(
            self.sampler != "fixed_width" or self.parametrisation != "group",
            "policy.sampler fixed_width never changes a width; set policy.parametrisation to atom, or take "
            "another sampler",
        )

    @property
    def floor(self) -> float:
        """Keep probabilities stay in [floor, 1 - floor], since 0 and 1 are absorbing."""
        return min(_FLOOR, 0.5 * self.rho)

    @property
    def draws(self) -> bool:
        """Whether a setting says how masks are to be drawn or learned from."""
        names = ("sampler", "estimator", "parametrisation", "optimizer", "lr")
        return any(getattr(self, name) != getattr(PolicyConfig, name) for name in names)

    @classmethod
    def paper(cls, **fields: Any) -> PolicyConfig:
        """Masks drawn anew in every round, a probability per atom, learned by Adam (Zhou et al. 2021), from
        ``rloo``, which varies less than their ``vr_pge``; and these fields.
        """
        paper: dict[str, Any] = {
            "sampler": "bernoulli",
            "estimator": "rloo",
            "parametrisation": "atom",
            "optimizer": "adam",
            "lr": 12e-3,
        }
        return cls(**(paper | fields))

    def resolved(self, compiled: bool, trained: bool = False) -> PolicyConfig:
        """The same with choices in the places of ``auto``; widths of ``compiled`` subnets should never
        change, and weights to start from that are ``trained`` are ranked. Raises ValueError: the sampler does
        not go with another setting."""
        sampler, estimator, parametrisation = self.sampler, self.estimator, self.parametrisation
        if sampler == "auto":
            sampler = "bernoulli" if estimator == "disarm_cv" else "persistent"
            exchanges = self.search == "forward" and self.parametrisation != "group"
            sampler = "fixed_width" if compiled or exchanges else sampler
        if estimator == "auto":
            estimator = "disarm_cv" if sampler == "bernoulli" else "rloo"
        if parametrisation == "auto":
            parametrisation = "atom" if sampler == "fixed_width" else "group"
        start = self.start
        if start == "auto":
            start = "norm_scale" if trained else "uniform"
        search = self.search
        if search == "auto":
            search = "none" if trained and not self.draws else "sampled"
        return replace(
            self,
            search=search,
            start=start,
            sampler=sampler,
            estimator=estimator,
            parametrisation=parametrisation,
        )
