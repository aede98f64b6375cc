"""The typed configuration tree of a run.

Every field is a leaf with a default, so that a YAML file only names what it changes and every leaf can be
overridden on the command line by its dotted name (``--policy.rho 0.1``). The classes hold data and check
single values; they import nothing of the package, so that every room can take its own branch of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MethodName = Literal["sparse_offload", "dense", "static"]
Residual = Literal["coupled", "internal", "filter"]
TrainCrop = Literal["pad", "resized"]
Reference = Literal["every_step", "turns", "round_start"]
EstimatorName = Literal["vr_pge", "rloo"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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


@dataclass
class AtomsConfig:
    """What is kept or dropped as one.

    Attributes:
        block: channels per atom; 8 or 16 keep widths at multiples that matrix units like, and move rows in
            longer runs. The last atom of a width takes the remainder.
    """

    block: int = 1

    def __post_init__(self) -> None:
        _require(self.block >= 1, f"atoms.block is {self.block}; give at least 1 channel per atom")


@dataclass
class DataConfig:
    """Which images are read, and how they become batches.

    Attributes:
        name: ``fashion_mnist_small`` (embedded), a dataset name on the hub, a folder of images (one
            sub-folder per class and split), a parquet file, or a folder of parquet files named after their
            splits.
        train_split: split used for training.
        test_split: split used for the reported accuracy.
        validation_split: split for the accuracy shown while training; empty means that ``validation_size``
            decides.
        validation_size: share of the training split held out for validation, in [0, 1).
        image_column: column that holds the images.
        label_column: column that holds integer class labels.
        batch_size: images per optimizer step over all ranks (the global batch).
        num_workers: decoding processes per rank; 0 decodes in the training process.
        image_size: side in pixels that images are resized to; 0 keeps the size of the images.
        streaming: read parquet files where they lie, by row groups, instead of through a copy in the
            library's cache; image folders are always read where they lie.
        shuffle_buffer: with ``streaming``, rows that are shuffled together, behind a random order of row
            groups; a worker holds about as many encoded images.
        train_crop: how training images get to their size. ``pad`` resizes and crops the middle as in
            evaluation, then takes a random crop of ``random_crop``; ``resized`` scales a random part to
            ``image_size`` (area 8-100 %, aspect ratio 3:4-4:3: the usual recipe for ImageNet).
        eval_resize: pixels that the shorter side is scaled to before the middle ``image_size`` pixels are
            cut out for evaluation; 0 takes ``image_size``.
        random_crop: pixels of zero padding of a random crop; 0 crops nothing.
        random_flip: flip images horizontally at random.
        mean: mean per channel of images in [0, 1]; empty measures it on training images.
        std: standard deviation per channel of images in [0, 1]; empty measures it on training images.
        train_limit: use only this many training images; 0 uses all.
        test_limit: use only this many test images; 0 uses all.
        cache_bytes: splits that take no more than this many bytes when decoded are kept decoded in memory.
        corrupt_limit: images that cannot be decoded and are replaced (in training) or left out (in
            evaluation) before it is an error; each rank counts those that it meets.
        num_classes: classes; like the next two for ``dry_run`` alone, which reads no images.
        channels: channels of the images.
        train_images: images of the training split.
    """

    name: str = "fashion_mnist_small"
    train_split: str = "train"
    test_split: str = "test"
    validation_split: str = ""
    validation_size: float = 0.0
    image_column: str = "image"
    label_column: str = "label"
    batch_size: int = 256
    num_workers: int = 0
    image_size: int = 0
    streaming: bool = False
    shuffle_buffer: int = 1024
    train_crop: TrainCrop = "pad"
    eval_resize: int = 0
    random_crop: int = 0
    random_flip: bool = False
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    train_limit: int = 0
    test_limit: int = 0
    cache_bytes: int = 1 << 30
    corrupt_limit: int = 100
    num_classes: int = 0
    channels: int = 0
    train_images: int = 0

    def __post_init__(self) -> None:
        _require(
            self.batch_size >= 1, f"data.batch_size is {self.batch_size}; give at least 1 image per step"
        )
        _require(
            0 <= self.validation_size < 1,
            f"data.validation_size is {self.validation_size}; give a share of the training images in [0, 1)",
        )
        for name in (
            *("num_workers", "image_size", "random_crop", "train_limit", "test_limit", "cache_bytes"),
            *("eval_resize", "corrupt_limit", "num_classes", "channels", "train_images"),
        ):
            _require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; give 0 or more")
        _require(
            self.shuffle_buffer >= 1, f"data.shuffle_buffer is {self.shuffle_buffer}; give at least 1 row"
        )
        resized = self.train_crop == "resized"
        _require(not resized or self.image_size > 0, "data.train_crop resized needs data.image_size")
        _require(
            not (resized and self.random_crop),
            "data.random_crop belongs to data.train_crop pad; set it to 0",
        )
        _require(
            self.eval_resize == 0 or 0 < self.image_size <= self.eval_resize,
            f"data.eval_resize is {self.eval_resize}; give at least data.image_size ({self.image_size})",
        )


@dataclass
class PolicyConfig:
    """How channel masks are drawn and how their keep probabilities are learned.

    Attributes:
        rho: remaining ratio of the atoms, in (0, 1] (the paper's budget: sum of s is at most rho times the
            atoms; an atom is one channel unless ``atoms.block`` is larger).
        estimator: gradient estimator of the keep probabilities.
        optimizer: optimizer of the keep probabilities.
        lr: its learning rate (the paper: Adam, 12e-3).
        momentum: momentum of ``sgd``.
        alpha: exponent of the preconditioner H = diag(s(1-s))^alpha.
        floor: keep probabilities stay in [floor, 1 - floor], since 0 and 1 are absorbing.
        min_width: atoms that every group keeps, whatever is drawn.
        hard_cap: a drawn mask never keeps more than hard_cap times the expected number of atoms.
    """

    rho: float = 0.25
    estimator: EstimatorName = "rloo"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 12e-3
    momentum: float = 0.9
    alpha: float = 0.5
    floor: float = 0.005
    min_width: int = 1
    hard_cap: float = 1.25

    def __post_init__(self) -> None:
        _require(
            0 < self.rho <= 1, f"policy.rho is {self.rho}; give a remaining ratio in (0, 1], such as 0.25"
        )
        _require(self.lr >= 0, f"policy.lr is {self.lr}; give 0 or more")
        _require(0 <= self.momentum < 1, f"policy.momentum is {self.momentum}; give a value in [0, 1)")
        _require(0 <= self.alpha <= 1, f"policy.alpha is {self.alpha}; give a value in [0, 1]")
        _require(0 <= self.floor < 0.5, f"policy.floor is {self.floor}; give a value in [0, 0.5)")
        _require(
            self.floor <= self.rho,
            f"policy.floor {self.floor} is above policy.rho {self.rho}: no keep probability could meet the "
            "budget; lower policy.floor",
        )
        _require(self.min_width >= 1, f"policy.min_width is {self.min_width}; give at least 1 atom")
        _require(self.hard_cap >= 1, f"policy.hard_cap is {self.hard_cap}; give 1 or more")


@dataclass
class RoundConfig:
    """What happens between two draws of the masks.

    Attributes:
        k: optimizer steps that a subnet is trained before the next masks are drawn. 1 is Algorithm 1 of the
            paper.
        reference: when the second loss is measured. ``every_step`` trains m1 and evaluates m2 at each step
            (paper); ``turns`` trains m1 on even and m2 on odd steps and evaluates the other; ``round_start``
            compares both at the first step of a round only.
        freeze_at: share of all steps after which s is frozen, the final mask is chosen and trained to the end
            (the short fine-tune of the paper). 1 chooses it after the last step.
        check_ranks: compare checksums of s, masks and subnet weights over all ranks in every round (slow, for
            debugging).
    """

    k: int = 50
    reference: Reference = "turns"
    freeze_at: float = 0.8
    check_ranks: bool = False

    def __post_init__(self) -> None:
        _require(self.k >= 1, f"round.k is {self.k}; give at least 1 step per round")
        _require(
            0 <= self.freeze_at <= 1,
            f"round.freeze_at is {self.freeze_at}; give a share of the steps in [0, 1]",
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
        schedule: learning rate after the warm-up.
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
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; give 0 or more")
        _require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; give a value in [0, 1)")
        _require(not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optim.betas is {self.betas}; give two values in [0, 1)",
        )
        _require(
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
        verify: check slice = mask on the model before training starts.
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
    verify: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"train.epochs is {self.epochs}; give at least 1")
        for name in ("max_steps", "eval_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; give 0 or more")
        _require(self.log_every >= 1, f"train.log_every is {self.log_every}; give at least 1")


@dataclass
class FinalConfig:
    """How the final network is chosen.

    Attributes:
        candidates: masks drawn from p(m|s), beside the most probable one; the best by training loss is kept.
        selection_batches: training batches that each candidate is measured on.
        bn_batches: training batches that the BatchNorm statistics are re-estimated on.
    """

    candidates: int = 8
    selection_batches: int = 4
    bn_batches: int = 20

    def __post_init__(self) -> None:
        _require(self.candidates >= 0, f"final.candidates is {self.candidates}; give 0 or more")
        _require(
            self.selection_batches >= 1,
            f"final.selection_batches is {self.selection_batches}; give at least 1",
        )
        _require(self.bn_batches >= 1, f"final.bn_batches is {self.bn_batches}; give at least 1")


@dataclass
class StaticConfig:
    """The control ``static``: a narrow network, fixed from the start.

    Attributes:
        flops_ratio: its share of the dense network's FLOPs; 0 takes the share of a network that keeps
            ``policy.rho`` of every group.
    """

    flops_ratio: float = 0.0

    def __post_init__(self) -> None:
        _require(
            0 <= self.flops_ratio <= 1, f"static.flops_ratio is {self.flops_ratio}; give a value in [0, 1]"
        )


@dataclass
class PaperConfig:
    """The published figures that a run aims at; 0 where the text gives none.

    Attributes:
        source: paper, and its table or figure.
        accuracy: accuracy in %.
        dense_accuracy: accuracy of the dense network in %.
        params: remaining parameters in %.
        flops: remaining FLOPs in %.
        train_cost_saving: how many times cheaper than dense training.
    """

    source: str = ""
    accuracy: float = 0.0
    dense_accuracy: float = 0.0
    params: float = 0.0
    flops: float = 0.0
    train_cost_saving: float = 0.0

    def __post_init__(self) -> None:
        for name in ("accuracy", "dense_accuracy", "params", "flops"):
            _require(
                0 <= getattr(self, name) <= 100,
                f"paper.{name} is {getattr(self, name)}; give a percentage, or 0 for none",
            )
        _require(
            self.train_cost_saving >= 0,
            f"paper.train_cost_saving is {self.train_cost_saving}; give a factor, or 0 for none",
        )


@dataclass
class RunConfig:
    """Everything a run depends on.

    Attributes:
        method: what a training step is.
        run_dir: folder of the run; created, and never mixed with another run's files.
        overwrite: replace the files of an earlier run in ``run_dir``.
        dry_run: print network, cost, steps and the figures to reach, and stop; no image is read, no file
            written.
        trackers: names of accelerate's trackers to log to, such as ``tensorboard``.
    """

    method: MethodName = "sparse_offload"
    run_dir: Path = Path("runs/default")
    overwrite: bool = False
    dry_run: bool = False
    trackers: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    atoms: AtomsConfig = field(default_factory=AtomsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    static: StaticConfig = field(default_factory=StaticConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)
