"""Rounds, the optimizer of the weights, and the choice of the final network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from offload_sparse.channels.require import require
from offload_sparse.policy.config import PolicyConfig, SearchName

OnNonFinite = Literal["stop", "skip", "rollback"]
Reference = Literal["every_step", "turns", "round_start"]
Transfer = Literal["auto", "full", "delta", "overlap"]
Sync = Literal["step", "round"]
Subnets = Literal["shared", "references", "per_rank", "partition"]

SEARCHED: dict[SearchName, float] = {"probe": 0.25, "forward": 0.2, "sampled": 0.05}
"""Share of the steps in which each search looks for the structure; the rest trains what it has found."""

SHORTEST_SEARCH = 0.1
"""Share of the steps that ``probe`` takes at least: its cycles need time."""


@dataclass
class RoundConfig:
    """What happens between two draws of the masks.

    Attributes:
        k: optimizer steps that a subnet is trained before the next masks are drawn. 1 is Algorithm 1 of the
            paper.
        reference: when the second loss is measured. ``every_step`` trains m1 and evaluates m2 at each step
            (paper); ``turns`` trains m1 on even and m2 on odd steps and evaluates the other; ``round_start``
            compares both at the first step of a round only.
        sync: when ranks talk. ``step`` averages the gradients of every step. ``round`` lets each rank train
            its copy of the subnet by itself, exchanges nothing but losses on the way, and averages weights,
            optimizer slots and statistics once, at the end of a round (local SGD; Stich 2019): for slow
            links. During the first ``optim.warmup_epochs`` ranks talk at every step.
        subnets: which masks ranks share. ``shared``: all. ``references``: each rank evaluates a reference of
            its own. ``per_rank`` (with ``sync round``): each trains a subnet of its own, and no reference is
            evaluated; an entry is averaged over the ranks that held it. ``partition``: the same with masks
            that overlap as little as they can, not at all while rho times the ranks is at most 1. All but
            ``shared`` learn s by leave-one-out over the ranks, and exclude ``turns`` where there are
            references.
        outer: with ``sync round``, learning rate and momentum of an outer step: the averaged movement of a
            round is a gradient, along which the weights take a step of SGD with Nesterov momentum (DiLoCo,
            Douillard et al. 2023, whose values are [0.7, 0.9]). [1, 0] is the plain average. Momentum takes
            one more slot per weight in the store.
        freeze_at: share of all steps after which s is frozen, the final mask is chosen and trained to the
            end. 1 chooses it after the last step, as Algorithm 1 of the paper does. ``auto`` is .2 for
            ``policy.search`` ``forward``, .05 for ``sampled``, and .25 for ``probe``, but at most 6,400
            steps, or .1 where that is more, and 0 in a run of fewer than 6,400 steps: so short a search has
            gained nothing.
        prefetch: draw the masks of a round while the one before is trained, so that their weights can be
            fetched meanwhile. Their s is then one round old.
        transfer: what crosses the bus between two rounds. ``full`` takes all of a subnet back and fetches all
            of the next one. ``delta`` leaves what both share on the device; it takes the memory of two pairs
            of subnets instead of one. ``overlap`` is ``delta`` while the steps go on (needs ``prefetch``).
            ``auto`` is ``overlap`` on a GPU with ``prefetch``, else ``delta``: on a CPU the transfers would
            take the cores of the steps. With ``sync round`` nothing can stay: ``overlap`` fetches during the
            steps what they do not train, and ``auto`` takes it with ``prefetch``, else ``full``, as where
            every rank trains a subnet of its own.
    """

    k: int = 50
    reference: Reference = "turns"
    sync: Sync = "step"
    subnets: Subnets = "shared"
    outer: list[float] = field(default_factory=lambda: [1.0, 0.0])
    freeze_at: float | Literal["auto"] = "auto"
    prefetch: bool = True
    transfer: Transfer = "auto"

    def __post_init__(self) -> None:
        require(self.k >= 1, f"round.k is {self.k}; give at least 1 step per round")
        require(
            self.freeze_at == "auto" or 0 <= self.freeze_at <= 1,
            f"round.freeze_at is {self.freeze_at}; give a share of the steps in [0, 1]",
        )
        require(
            self.subnets != "references" or self.reference != "turns",
            "round.subnets references needs references that are only evaluated; set round.reference to "
            "every_step or round_start",
        )
        require(
            self.sync == "round" or self.subnets in ("shared", "references"),
            f"round.subnets {self.subnets} trains another subnet on every rank; set round.sync to round",
        )
        require(
            len(self.outer) == 2 and 0 < self.outer_lr < float("inf") and 0 <= self.outer_momentum < 1,
            f"round.outer is {self.outer}; give a learning rate above 0 and a momentum in [0, 1), such as "
            "[0.7, 0.9]",
        )
        require(
            self.sync == "round" or not self.outer_step,
            "round.outer is of round.sync round; set round.sync to round, or remove round.outer",
        )
        require(
            self.sync == "step" or self.transfer != "delta",
            "round.transfer delta leaves entries on the device, but round.sync round averages "
            "them with those of other ranks; set it to auto",
        )
        require(
            self.transfer != "overlap" or self.prefetch,
            "round.transfer overlap needs round.prefetch; set it to true, or round.transfer to auto",
        )
        require(
            self.transfer != "overlap" or not self.own_subnets,
            f"round.transfer overlap needs subnets that ranks share, but round.subnets is "
            f"{self.subnets}; set round.transfer to auto",
        )

    def searched(self, search: SearchName) -> float:
        """Share of the steps in which ``policy.search`` looks for the structure."""
        return SEARCHED.get(search, 0.0) if self.freeze_at == "auto" else self.freeze_at

    def freeze_step(self, search: SearchName, total_steps: int) -> int:
        """Optimizer steps in which ``policy.search`` looks for the structure: with ``auto`` none where
        ``probe`` has no time for two cycles, and no more than it needs."""
        steps = round(self.searched(search) * total_steps)
        if search != "probe" or self.freeze_at != "auto":
            return steps
        enough = max(PolicyConfig.search_steps, round(SHORTEST_SEARCH * total_steps))
        return 0 if steps < 2 * PolicyConfig.cycle_steps else min(steps, enough)

    @property
    def delta(self) -> bool:
        """Whether what two successive rounds share stays on the device."""
        return self.transfer != "full" and self.sync == "step"

    def overlaps(self, on_cuda: bool) -> bool:
        """Whether transfers run beside the steps."""
        auto = (on_cuda or self.sync == "round") and self.prefetch and not self.own_subnets
        return self.transfer == "overlap" or (self.transfer == "auto" and auto)

    @property
    def pairs(self) -> int:
        """Pairs of subnets on the device: with two, a round can be fetched beside the one before."""
        return 1 + (self.delta or self.overlaps(on_cuda=False))

    @property
    def own_subnets(self) -> bool:
        return self.subnets in ("per_rank", "partition")

    @property
    def outer_lr(self) -> float:
        return self.outer[0]

    @property
    def outer_momentum(self) -> float:
        return self.outer[1]

    @property
    def outer_step(self) -> bool:
        """Whether a round's movement is more, or less, than the average of the ranks'."""
        return (self.outer_lr, self.outer_momentum) != (1, 0)


@dataclass
class OptimConfig:
    """How the weights are trained.

    Attributes:
        name: ``sgd`` (one optimizer slot per weight when momentum is used) or ``adamw`` (two).
        lr: peak learning rate at the configured batch size.
        momentum: momentum of ``sgd``.
        weight_decay: decay of every weight that takes part in a step.
        label_smoothing: label smoothing of the cross entropy, in [0, 1).
        warmup_epochs: epochs of linear warm-up (fractions allowed), in every cycle of a search, of which it
            takes a quarter at most.
        schedule: learning rate after the warm-up; ``step`` divides it by ten at each of ``milestones``.
        milestones: epochs at which ``step`` lowers the learning rate.
        clip_norm: largest norm of the gradient of the subnet; 0 clips nothing.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    milestones: list[float] = field(default_factory=list)
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; give 0 or more")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; give a value in [0, 1)")
        require(
            self.schedule == "step" or not self.milestones,
            f"optim.milestones belong to optim.schedule step, not {self.schedule}; set it or remove them",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"optim.label_smoothing is {self.label_smoothing}; give a value in [0, 1)",
        )


@dataclass
class FinalConfig:
    """How the final network is chosen.

    Attributes:
        candidates: masks drawn from p(m|s), beside the most probable one; the best by training loss is kept.
    """

    selection_batches: ClassVar[int] = 4
    """Training batches that each candidate is measured on."""
    bn_batches: ClassVar[int] = 20
    """Training batches that the BatchNorm statistics are re-estimated on."""

    candidates: int = 8

    def __post_init__(self) -> None:
        require(self.candidates >= 0, f"final.candidates is {self.candidates}; give 0 or more")


def check_combination(policy: PolicyConfig, rounds: RoundConfig) -> None:
    """What neither branch can see by itself. Raises ValueError: they exclude each other."""
    require(
        rounds.subnets == "shared" or policy.estimator == "rloo",
        f"round.subnets {rounds.subnets} learns by leave-one-out, not by {policy.estimator}; set "
        "policy.estimator to rloo, or round.subnets to shared",
    )
    require(
        rounds.subnets != "partition" or policy.sampler == "bernoulli",
        f"round.subnets partition draws all masks of a round at once, not by {policy.sampler}; set "
        "policy.sampler to bernoulli",
    )
    require(
        not rounds.own_subnets or policy.search == "sampled",
        f"policy.search {policy.search} has one mask at a time; set round.subnets to shared",
    )
    require(
        policy.search != "probe" or rounds.searched("probe") >= SHORTEST_SEARCH,
        f"policy.search probe goes in cycles of training, and round.freeze_at {rounds.freeze_at} leaves no "
        "time for them; set it to auto",
    )
