"""Rounds, the optimizer of the weights, and the choice of the final network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from offload_sparse.channels.require import require
from offload_sparse.export.description import ExportLayout
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.store.config import Switch

OnNonFinite = Literal["stop", "skip", "rollback"]
Reference = Literal["every_step", "turns", "round_start"]


@dataclass
class RoundConfig:
    """What happens between two draws of the masks.

    Attributes:
        k: optimizer steps that a subnet is trained before the next masks are drawn. 1 is Algorithm 1 of the
            paper.
        reference: when the second loss is measured. ``every_step`` trains m1 and evaluates m2 at each step
            (paper); ``turns`` trains m1 on even and m2 on odd steps and evaluates the other; ``round_start``
            compares both at the first step of a round only.
        references: ``shared`` gives all ranks the same reference mask; ``per_rank`` lets each evaluate one of
            its own, and s is learned from all of them by leave-one-out (one more all-gather of scalars, less
            variance). Not with ``turns``, which trains the reference.
        freeze_at: share of all steps after which s is frozen, the final mask is chosen and trained to the end
            (the short fine-tune of the paper). 1 chooses it after the last step.
        prefetch: draw the masks of a round while the one before is trained, so that their weights can be
            fetched meanwhile. Their s is then one round old.
        delta: leave what two successive rounds share on the device, so that only newcomers and leavers cross
            the bus. Takes the memory of two pairs of subnets instead of one.
        overlap: fetch and return while the steps go on (needs ``prefetch`` and ``delta``). ``auto`` does so
            on a GPU; on a CPU the transfers would take the cores of the steps.
        reduce: how gradients are averaged over ranks: in one piece behind the backward pass, in buckets
            during it, or (``auto``) whichever of the two is faster in the first steps.
        check_ranks: compare checksums of s, masks and subnet weights over all ranks in every round (slow, for
            debugging).
    """

    k: int = 50
    reference: Reference = "turns"
    references: Literal["shared", "per_rank"] = "shared"
    freeze_at: float = 0.05
    prefetch: bool = True
    delta: bool = True
    overlap: Switch = "auto"
    reduce: Literal["auto", "single", "bucketed"] = "auto"
    check_ranks: bool = False

    def __post_init__(self) -> None:
        require(self.k >= 1, f"round.k is {self.k}; give at least 1 step per round")
        require(
            0 <= self.freeze_at <= 1,
            f"round.freeze_at is {self.freeze_at}; give a share of the steps in [0, 1]",
        )
        require(
            self.references == "shared" or self.reference != "turns",
            "round.references per_rank needs references that are only evaluated; set round.reference to "
            "every_step or round_start",
        )
        require(
            self.overlap != "on" or (self.prefetch and self.delta),
            "round.overlap on needs round.prefetch and round.delta; set them to true, or overlap to auto",
        )


@dataclass
class OptimConfig:
    """How the weights are trained.

    Attributes:
        name: ``sgd`` (one optimizer slot per weight when momentum is used) or ``adamw`` (two).
        lr: peak learning rate at the configured batch size.
        momentum: momentum of ``sgd``.
        nesterov: Nesterov momentum of ``sgd``.
        betas: coefficients of ``adamw``.
        weight_decay: decay of every weight that takes part in a step.
        label_smoothing: label smoothing of the cross entropy, in [0, 1).
        warmup_epochs: epochs of linear warm-up (fractions allowed).
        schedule: learning rate after the warm-up; ``step`` multiplies it by ``decay`` at each of
            ``milestones``.
        milestones: epochs at which ``step`` lowers the learning rate.
        decay: factor of ``step``.
        clip_norm: largest norm of the gradient of the subnet; 0 clips nothing.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    milestones: list[float] = field(default_factory=list)
    decay: float = 0.1
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; give 0 or more")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; give a value in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optim.betas is {self.betas}; give two values in [0, 1)",
        )
        require(0 < self.decay <= 1, f"optim.decay is {self.decay}; give a factor in (0, 1]")
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
        selection_batches: training batches that each candidate is measured on.
        bn_batches: training batches that the BatchNorm statistics are re-estimated on.
        layout: how weights are written. ``csr`` and ``coo`` leave zeros out; ``auto`` takes the smallest of
            the three for each tensor.
    """

    candidates: int = 8
    selection_batches: int = 4
    bn_batches: int = 20
    layout: ExportLayout = "auto"

    def __post_init__(self) -> None:
        require(self.candidates >= 0, f"final.candidates is {self.candidates}; give 0 or more")
        require(
            self.selection_batches >= 1,
            f"final.selection_batches is {self.selection_batches}; give at least 1",
        )
        require(self.bn_batches >= 1, f"final.bn_batches is {self.bn_batches}; give at least 1")


def check_combination(policy: PolicyConfig, rounds: RoundConfig) -> None:
    """What neither branch can see by itself.

    Raises:
        ValueError: they exclude each other.
    """
    require(
        rounds.references == "shared" or policy.estimator == "rloo",
        f"round.references per_rank learns by leave-one-out, not by {policy.estimator}; set policy.estimator "
        "to rloo, or round.references to shared",
    )
