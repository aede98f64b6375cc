"""The typed configuration tree of a run.

Every field is a leaf with a default, so that a YAML file only names what it changes and every leaf can be
overridden on the command line by its dotted name (``--policy.rho 0.1``). The classes hold data and check
single values. Each room keeps its own branch in a module that imports nothing heavy; this one joins them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from offload_sparse.channels.config import AtomsConfig, chosen_block
from offload_sparse.channels.require import require
from offload_sparse.config.methods import DFBSTConfig, DSTConfig, StaticConfig
from offload_sparse.engine.config import SHORTEST_SEARCH, OptimConfig, RoundConfig, check_combination
from offload_sparse.policy.config import PolicyConfig, SearchName
from offload_sparse.store.config import StoreConfig
from offload_sparse.workloads.config import LOGITS_ONLY, DataConfig, ModelConfig

MethodName = Literal["sparse_offload", "dense", "static", "dfbst", "dst", "grow_efficient", "rigl"]


@dataclass
class TrainConfig:
    """The run around the method.

    Attributes:
        epochs: passes over the training images.
        max_steps: stop after this many optimizer steps; 0 lets ``epochs`` decide.
        precision: ``bf16`` and ``fp16`` autocast forward passes, while weights, optimizer slots and gradients
            stay in float32, as with ``no``; ``fp16`` scales the loss. ``tf32`` casts nothing but lets matrix
            products round their factors to TF32 where the device has it. ``float64`` is for everything.
        batch_norm: ``batch`` normalises with the statistics of each rank's own images (as
            DistributedDataParallel does), ``frozen`` with the running statistics, which makes a step
            independent of how images are spread over ranks.
        eval_every: epochs between evaluations while training; 0 evaluates only at the end.
        log_every: steps between lines in metrics.jsonl; those of an epoch at most.
        seed: seed of initial weights, masks, data order and augmentation.
        on_nonfinite: what happens when a loss or gradient is not finite on some rank; the weights never see
            it. ``stop`` ends the run, ``skip`` leaves out the step, ``rollback`` goes on behind the
            batches that led there: ``sparse_offload`` from the end of its last good round, other methods (and
            that one after ten bad steps in a row, unless its store is in files) from the last checkpoint.
        timeout: seconds that a rank waits for the others before it takes one for dead; loading data and
            checking the model count too.
        check: before training starts, check slice = mask on the model, and refuse what would not fit into
            memory (see ``offload-sparse plan``).
        distill: learn from the full network that ``model.weights`` gives, too: its logits for every image, as
            evaluation sees it, are computed once, on the CPU, and kept in the run's folder; the loss is half
            that of the labels, half 16 times the divergence from these logits at temperature 4.
    """

    epochs: int = 10
    max_steps: int = 0
    precision: Literal["no", "tf32", "bf16", "fp16", "float64"] = "no"
    batch_norm: Literal["batch", "frozen"] = "batch"
    eval_every: int = 1
    log_every: int = 10
    seed: int = 0
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    timeout: int = 600
    check: bool = True
    distill: bool = False

    def __post_init__(self) -> None:
        require(self.timeout >= 1, f"train.timeout is {self.timeout}; give at least 1 second")
        require(self.epochs >= 1, f"train.epochs is {self.epochs}; give at least 1")
        for name in ("max_steps", "eval_every", "seed"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; give 0 or more")
        require(self.log_every >= 1, f"train.log_every is {self.log_every}; give at least 1")

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps or self.epochs * steps_per_epoch

    @property
    def dtype(self) -> Literal["float32", "float64"]:
        """Type of weights, optimizer slots and gradients."""
        return "float64" if self.precision == "float64" else "float32"

    @property
    def autocast(self) -> str:
        """What forward passes are cast to, as accelerate names it."""
        return self.precision if self.precision in ("bf16", "fp16") else "no"


@dataclass
class CheckpointConfig:
    """When the state of the run is saved, and what is kept.

    Whatever these say, a run saves where it is interrupted (SIGTERM, Ctrl-C), and after each evaluation that
    is the best so far; that checkpoint is kept, too.

    Attributes:
        every: time or steps between checkpoints: ``10min``, or ``500`` for steps; 0 for never. With
            ``train.on_nonfinite rollback`` or ``round.sync round`` one waits for the end of a round.
        keep: newest checkpoints that are kept.
    """

    every: str | int | float = "10min"
    keep: int = 2

    def __post_init__(self) -> None:
        self.every = str(self.every)
        require(
            re.fullmatch(r"\d+|\d+(\.\d+)?min", self.every) is not None,
            f"checkpoint.every is {self.every}; give minutes such as 10min, or steps such as 500",
        )
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; give at least 1")

    @property
    def every_minutes(self) -> float:
        """Minutes between checkpoints; 0 where steps are counted."""
        text = str(self.every)
        return float(text.removesuffix("min")) if text.endswith("min") else 0.0

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 where minutes are counted."""
        text = str(self.every)
        return 0 if text.endswith("min") else int(text)


@dataclass
class RunConfig:
    """Everything a run depends on.

    Attributes:
        method: what a training step is.
        run_dir: folder of the run; created, and never mixed with another run's files.
        overwrite: replace the files of an earlier run in ``run_dir``.
        resume: ``auto`` resumes the run that ``run_dir`` holds, ``never`` refuses such a folder; or
            the path of a checkpoint, or of a run, to start from.
        quiet: no progress bar and no line per epoch.
        dry_run: print network, cost, steps and the figures to reach, and stop; no image is read, no file
            written.
        compile: compile the forward passes of subnets with torch.compile. ``policy.sampler auto`` then keeps
            all widths fixed, so that nothing is compiled after the first round.
        trackers: accelerate's trackers to log to, such as ``tensorboard,wandb``; ``[]`` for none. Files of
            TensorBoard and aim are in ``trackers/`` in the run's folder, others where those put them.
        paper: figures that the run aims at, shown beside its own: ``source``, and in % ``accuracy``,
            ``dense_accuracy``, ``params`` and ``flops`` (remaining); ``train_cost_saving`` is a factor.
    """

    method: MethodName = "sparse_offload"
    run_dir: Path = Path("runs/default")
    overwrite: bool = False
    resume: str = "auto"
    quiet: bool = False
    dry_run: bool = False
    compile: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    paper: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    atoms: AtomsConfig = field(default_factory=AtomsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    static: StaticConfig = field(default_factory=StaticConfig)
    dst: DSTConfig = field(default_factory=DSTConfig)
    dfbst: DFBSTConfig = field(default_factory=DFBSTConfig)

    def __post_init__(self) -> None:
        self.run_dir = Path(os.path.expanduser(self.run_dir))
        if self.policy.search == "auto":
            self.policy = replace(self.policy, search=self._search())
        check_combination(self.policy.resolved(self.compile), self.round)
        require(
            self.policy.search != "probe" or self.optim.schedule == "cosine",
            "policy.search probe compares networks whose learning rate has come down at the end of each "
            "cycle; set optim.schedule to cosine",
        )
        require(
            not self.train.distill or self.model.has_teacher,
            "train.distill learns from a full network of the same classes; give its weights with "
            "model.weights",
        )
        require(
            self.train.distill or self.model.trained or not self.model.weights,
            f"model.weights is for {LOGITS_ONLY[1:]}, and nothing learns from them; set train.distill true",
        )
        require(
            all(isinstance(value, str | int | float) for value in self.paper.values()),
            "paper holds more than text and numbers; give a mapping such as {source: Table 2, flops: 8.7}",
        )
        require(
            self.train.precision != "fp16" or self.method == "sparse_offload",
            f"train.precision fp16 needs a scaled loss, which method {self.method} has not; set it to bf16",
        )
        for name in ("accuracy", "dense_accuracy", "params", "flops", "train_cost_saving"):
            value, most = self.paper.get(name, 0), 1e9 if name == "train_cost_saving" else 100
            require(
                isinstance(value, int | float) and 0 <= value <= most,
                f"paper.{name} is {value}; give a {'factor' if most > 100 else 'percentage'}",
            )

    @property
    def budgets(self) -> list[float]:
        """Shares of the members of the family that the run trains, the smallest first; empty where it trains
        none."""
        return sorted(self.policy.budgets) if self.method == "sparse_offload" else []

    def _search(self) -> SearchName:
        """What ``policy.search auto`` is: widths are probed unless something else is asked for. It does not
        depend on whether the method searches at all, so that another one may take its place."""
        asked = self.policy.draws
        asked |= any(getattr(self.round, n) != getattr(RoundConfig, n) for n in ("subnets", "reference"))
        asked |= self.method == "grow_efficient"  # whose freeze_at is that of sampled
        if self.model.trained and not asked and self.round.freeze_at == "auto":
            return "none"  # the one-shot cut: no search from it has ended above it
        asked |= self.model.trained or self.optim.schedule != "cosine"
        leaves_time = self.round.freeze_at == "auto" or SHORTEST_SEARCH <= self.round.freeze_at < 1
        return "probe" if leaves_time and not asked else "sampled"


def resolve(config: RunConfig, device: str) -> RunConfig:
    """The same with choices in the places of ``auto``, as a run takes them on a device of this type.

    ``store.pin`` stays ``auto`` on a CUDA device, where the driver has the last word.
    """
    transfer, pin, freeze_at = config.round.transfer, config.store.pin, config.round.freeze_at
    if transfer == "auto":
        rounds = config.round
        transfer = "overlap" if rounds.overlaps(device == "cuda") else "delta" if rounds.delta else "full"
    if config.policy.search != "probe":  # which may have no time: that is not known before the steps are
        freeze_at = config.round.searched(config.policy.search)
    if pin == "auto" and device != "cuda":
        pin = "off"
    return replace(
        config,
        policy=config.policy.resolved(config.compile, config.model.trained),
        atoms=AtomsConfig(chosen_block(config.atoms.block, device, config.train.precision == "bf16")),
        round=replace(config.round, transfer=transfer, freeze_at=freeze_at),
        store=replace(config.store, pin=pin),
    )
