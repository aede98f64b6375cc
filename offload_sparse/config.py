"""The typed configuration tree of a run.

Every field is a leaf with a default, so that a YAML file only names what it changes and every leaf can be
overridden on the command line by its dotted name (``--policy.rho 0.1``). The classes hold data and check
single values; the modules beside
this one hold its larger branches. None imports any room, so that every room can take its own branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offload_sparse.data_config import DataConfig, TrainCrop
from offload_sparse.method_config import (
    DFBSTConfig,
    DSTConfig,
    GrowEfficientConfig,
    PaperConfig,
    RigLConfig,
    StaticConfig,
)
from offload_sparse.policy_config import (
    BudgetName,
    EstimatorName,
    PolicyConfig,
    Reference,
    RoundConfig,
    SamplerName,
    Switch,
    check_combination,
)
from offload_sparse.requirement import require

__all__ = [
    "AtomsConfig",
    "BudgetName",
    "CheckpointConfig",
    "DFBSTConfig",
    "DSTConfig",
    "DataConfig",
    "EstimatorName",
    "ExportLayout",
    "FinalConfig",
    "GrowEfficientConfig",
    "MethodName",
    "ModelConfig",
    "OnNonFinite",
    "OptimConfig",
    "PaperConfig",
    "PolicyConfig",
    "Reference",
    "Residual",
    "RigLConfig",
    "RoundConfig",
    "RunConfig",
    "SamplerName",
    "StaticConfig",
    "StoreConfig",
    "Switch",
    "TierName",
    "TrainConfig",
    "TrainCrop",
    "check_combination",
]

MethodName = Literal["sparse_offload", "dense", "static", "dfbst", "dst", "grow_efficient", "rigl"]
ExportLayout = Literal["auto", "dense", "coo", "csr"]
Residual = Literal["coupled", "internal", "filter"]
OnNonFinite = Literal["stop", "skip", "rollback"]
TierName = Literal["ram", "file", "nvme"]


@dataclass
class ModelConfig:
    """Which network is trained.

    Attributes:
        name: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        residual: what is sampled on residual streams: ``coupled`` narrows each stream with one mask,
            ``internal`` keeps the streams dense and samples only the widths inside the blocks, ``filter``
            masks every filter by itself (Zhou et al. 2021): a stream holds what any of its branches keeps.
        arguments: further keyword arguments of the model's constructor.
    """

    name: str = "offload_sparse/vgg_small"
    residual: Residual = "coupled"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name is empty; give one such as torchvision/resnet50")


@dataclass
class AtomsConfig:
    """What is kept or dropped as one.

    Attributes:
        block: channels per atom; 8 or 16 keep widths at multiples that matrix units like, and move rows in
            longer runs. The last atom of a width takes the remainder.
    """

    block: int = 1

    def __post_init__(self) -> None:
        require(self.block >= 1, f"atoms.block is {self.block}; give at least 1 channel per atom")


@dataclass
class StoreConfig:
    """Where the full weights and their optimizer slots live.

    Attributes:
        tier: ``ram`` holds them in memory, ``file`` in memory-mapped files, of which the system keeps in
            memory what it has room for. ``nvme`` is ``file`` with rounds that go past the page cache, through
            DeepSpeed's DeepNVMe (extra ``deepspeed``, package libaio-dev), and equals ``file`` without it.
        path: folder of the files; empty takes ``store`` in the run's folder.
        pin: page-lock the store's host memory, so that a CUDA device reads it directly. ``auto`` does so for
            runs on a CUDA device and goes on with ordinary memory if the driver refuses, ``on`` makes a
            refusal an error, ``off`` never does.
        shard: ``world`` spreads the rows over all ranks; ``node`` over those of each node, so that every node
            holds all weights and assembling a subnet needs no network between nodes.
    """

    tier: TierName = "ram"
    path: str = ""
    pin: Switch = "auto"
    shard: Literal["world", "node"] = "world"


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
class TrainConfig:
    """The run around the method.

    Attributes:
        epochs: passes over the training images.
        max_steps: stop after this many optimizer steps; 0 lets ``epochs`` decide.
        precision: ``bf16`` autocasts forward passes; the weights stay in ``dtype``.
        dtype: type of weights, optimizer slots and gradients.
        batch_norm: ``batch`` normalises with the statistics of each rank's own images (as
            DistributedDataParallel does), ``frozen`` with the running statistics, which makes a step
            independent of how images are spread over ranks.
        eval_every: epochs between evaluations while training; 0 evaluates only at the end.
        log_every: steps between lines in metrics.jsonl.
        seed: seed of initial weights, masks, data order and augmentation.
        on_nonfinite: what happens when a loss or gradient is not finite on some rank; the weights never see
            it. ``stop`` ends the run, ``skip`` leaves out the step, ``rollback`` carries on behind the
            batches that led there: ``sparse_offload`` from the end of its last good round, other methods from
            the last checkpoint.
        deterministic: only algorithms that give the same bits on every run; slower, and an error where there
            is none.
        timeout: seconds that a rank waits for the others before it takes one for dead; loading data and
            checking the model count too.
        verify: check slice = mask on the model before training starts.
        check_plan: refuse to start what would not fit into memory (see ``offload-sparse plan``).
        progress: draw a progress bar on rank 0.
    """

    epochs: int = 10
    max_steps: int = 0
    precision: Literal["no", "bf16"] = "no"
    dtype: Literal["float32", "float64"] = "float32"
    batch_norm: Literal["batch", "frozen"] = "batch"
    eval_every: int = 1
    log_every: int = 10
    seed: int = 0
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    deterministic: bool = False
    timeout: int = 600
    verify: bool = True
    check_plan: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.timeout >= 1, f"train.timeout is {self.timeout}; give at least 1 second")
        require(self.epochs >= 1, f"train.epochs is {self.epochs}; give at least 1")
        for name in ("max_steps", "eval_every", "seed"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; give 0 or more")
        require(self.log_every >= 1, f"train.log_every is {self.log_every}; give at least 1")


@dataclass
class CheckpointConfig:
    """When the state of the run is saved, and what is kept.

    A run that is interrupted (SIGTERM, Ctrl-C) saves in any case.

    Attributes:
        every_minutes: minutes between checkpoints; 0 goes by ``every_steps`` alone.
        every_steps: steps between checkpoints; 0 goes by ``every_minutes`` alone. In the middle of a round a
            checkpoint waits for its end.
        keep: newest checkpoints that are kept.
        best: save after each evaluation that is the best so far, and keep that checkpoint too.
        background: write while training goes on.
    """

    every_minutes: float = 10.0
    every_steps: int = 0
    keep: int = 2
    best: bool = True
    background: bool = True

    def __post_init__(self) -> None:
        for name in ("every_minutes", "every_steps"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} is {getattr(self, name)}; give 0 or more")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; give at least 1")


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


@dataclass
class RunConfig:
    """Everything a run depends on.

    Attributes:
        method: what a training step is.
        run_dir: folder of the run; created, and never mixed with another run's files.
        overwrite: replace the files of an earlier run in ``run_dir``.
        resume: ``auto`` carries on with the run that ``run_dir`` holds, ``never`` refuses such a folder; or
            the path of a checkpoint, or of a run, to start from.
        dry_run: print network, cost, steps and the figures to reach, and stop; no image is read, no file
            written.
        compile: compile the forward passes of subnets with torch.compile. ``policy.sampler auto`` then keeps
            all widths fixed, so that nothing is compiled after the first round.
        trackers: accelerate's trackers to log to, such as ``tensorboard,wandb``; ``[]`` for none. Those that
            write files do so in ``trackers/`` in the run's folder.
    """

    method: MethodName = "sparse_offload"
    run_dir: Path = Path("runs/default")
    overwrite: bool = False
    resume: str = "auto"
    dry_run: bool = False
    compile: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    model: ModelConfig = field(default_factory=ModelConfig)
    atoms: AtomsConfig = field(default_factory=AtomsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    static: StaticConfig = field(default_factory=StaticConfig)
    dst: DSTConfig = field(default_factory=DSTConfig)
    dfbst: DFBSTConfig = field(default_factory=DFBSTConfig)
    rigl: RigLConfig = field(default_factory=RigLConfig)
    grow_efficient: GrowEfficientConfig = field(default_factory=GrowEfficientConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)

    def __post_init__(self) -> None:
        check_combination(self.policy.resolved(self.compile), self.round)
