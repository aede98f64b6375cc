"""Which images are read, and which network is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from offload_sparse.channels.config import Residual
from offload_sparse.channels.require import require

TrainCrop = Literal["pad", "resized"]
LOGITS_ONLY = "+logits_only"
"""Behind ``model.weights``: training starts afresh."""

_DECLARED = ("num_classes", "channels", "tokens", "train_images")


@dataclass
class DataConfig:
    """Which images are read, and how they become batches.

    Attributes:
        name: ``fashion_mnist_small`` (embedded), a dataset name on the hub, a folder of images
            (``<split>/<class>/…``, or ``<class>/…``, of which one in five is then for testing), or a parquet
            file, tar shards or a CSV or JSON-lines file of paths and labels, or a folder of such files
            named after their splits.
        splits: the split to train on, and the one that accuracy is reported on.
        validation: images for the accuracy shown while training: the name of a split, or a share of the
            training images that is held out, such as 0.1. Empty takes the test images.
        columns: the column of the images, and that of the class labels, numbers or names.
        class_map: file that names the class of each label (a JSON object, or lines of a label and a name);
            labels of one name become one class. Empty keeps the labels as names.
        batch_size: images per optimizer step over all ranks (the global batch).
        num_workers: decoding processes per rank; 0 decodes in the training process.
        image_size: side in pixels that images are resized to; 0 keeps the size of the images.
        streaming: read parquet files where they lie, by row groups, instead of through a copy in the
            library's cache; image folders are always read where they lie.
        train_crop: how training images get to their size. ``pad`` resizes and crops the middle as in
            evaluation, then takes a random crop of ``random_crop``; ``resized`` scales a random part to
            ``image_size`` (area 8-100 %, aspect ratio 3:4-4:3: the usual recipe for ImageNet).
        eval_resize: pixels that the shorter side is scaled to before the middle ``image_size`` pixels are
            cut out for evaluation; 0 takes ``image_size``.
        cache: folder for decoded images, which later runs read instead of the files; empty keeps none. Splits
            of up to 1 GiB are decoded into memory by every run instead. With ``train_crop`` resized, images
            are kept at about their final size, which is a little smoother.
        random_crop: pixels of zero padding of a random crop; 0 crops nothing.
        random_flip: flip images horizontally at random.
        mean: mean per channel of images in [0, 1]; empty measures it on training images.
        std: standard deviation per channel of images in [0, 1]; empty measures it on training images.
        limit: use only this many training images and this many test images; 0 uses all.
        declared: ``num_classes``, ``channels`` and ``train_images`` of the images, for ``dry_run`` and
            ``plan``, which read none; of a language model words, ``tokens`` of a sequence, and sequences.
    """

    cache_bytes: ClassVar[int] = 1 << 30
    """Splits that take no more than this many bytes when decoded are kept decoded in memory."""
    corrupt_limit: ClassVar[int] = 100
    """Images that cannot be decoded and are replaced (in training) or left out (in evaluation) before it is
    an error; each rank counts those that it meets."""
    shuffle_buffer: ClassVar[int] = 1024
    """With ``streaming``, rows that are shuffled together, behind a random order of row groups; a worker
    holds about as many encoded images."""

    name: str = "fashion_mnist_small"
    splits: list[str] = field(default_factory=lambda: ["train", "test"])
    validation: str | int | float = ""
    columns: list[str] = field(default_factory=lambda: ["image", "label"])
    class_map: str = ""
    batch_size: int = 256
    num_workers: int = 0
    image_size: int = 0
    streaming: bool = False
    train_crop: TrainCrop = "pad"
    eval_resize: int = 0
    cache: str = ""
    random_crop: int = 0
    random_flip: bool = False
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    limit: int = 0
    declared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validation = str(self.validation)
        for name, such_as in (("splits", "[train, test]"), ("columns", "[image, label]")):
            names = getattr(self, name)
            two = len(names) == 2 and all(names)
            require(two, f"data.{name} is {names}; give two names, such as {such_as}")
        for key, value in self.declared.items():
            require(
                key in _DECLARED and type(value) is int and value >= 0,
                f"data.declared.{key} is {value}; give whole numbers for {', '.join(_DECLARED)}",
            )
        require(bool(self.name), "data.name is empty; give the name of a dataset, or a path")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; give at least 1 image per step")
        require(
            0 <= self.validation_size < 1,
            f"data.validation is {self.validation}; give a share of the training images in [0, 1), or the "
            "name of a split",
        )
        for name in ("num_workers", "image_size", "random_crop", "limit", "eval_resize"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; give 0 or more")
        resized = self.train_crop == "resized"
        require(not resized or self.image_size > 0, "data.train_crop resized needs data.image_size")
        require(
            not (resized and self.random_crop),
            "data.random_crop belongs to data.train_crop pad; set it to 0",
        )
        require(
            self.eval_resize == 0 or 0 < self.image_size <= self.eval_resize,
            f"data.eval_resize is {self.eval_resize}; give at least data.image_size ({self.image_size})",
        )

    @property
    def image_column(self) -> str:
        return self.columns[0]

    @property
    def label_column(self) -> str:
        return self.columns[1]

    @property
    def validation_size(self) -> float:
        """Share of the training images that is held out; 0 where a split is named, or nothing."""
        return 0.0 if self.validation_split else float(self.validation or 0)

    def held_out(self, train_images: int) -> int:
        """How many of so many training images are held out: at least one of several, where any are."""
        share = self.validation_size
        return min(train_images - 1, max(1, round(share * train_images))) if share else 0

    @property
    def validation_split(self) -> str:
        """Name of the split of the validation images; empty where a share is held out, or nothing."""
        try:
            float(self.validation or 0)
        except ValueError:
            return str(self.validation)
        return ""


@dataclass
class ModelConfig:
    """Which network is trained.

    Attributes:
        name: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        residual: what is sampled on residual streams: ``coupled`` narrows each stream with one mask,
            ``internal`` keeps the streams dense and samples only the widths inside the blocks, ``filter``
            masks every filter by itself (Zhou et al. 2021): a stream holds what any of its branches keeps.
        arguments: further keyword arguments of the model's constructor; ``in_channels: 3`` has grey images
            repeated.
        weights: what training starts from, in place of fresh weights: a file (safetensors, or a state_dict of
            ``torch.save``), a folder of such files with an index, a finished run; or ``pretrained``, the
            published weights of a timm or torchvision name (``pretrained:IMAGENET1K_V1``) in the local cache.
            ``+new_head`` behind it starts the last layer afresh, as for other classes. With ``+logits_only``
            all start afresh and learn from its logits alone (``train.distill``), a control.
    """

    name: str = "offload_sparse/vgg_small"
    residual: Residual = "coupled"
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = ""

    def __post_init__(self) -> None:
        tagged = self.name.startswith("timm/") and "." in self.name
        require(
            bool(self.weights) or not tagged,
            f"{self.name} names published weights, and training starts from fresh ones; write "
            f"{self.name.partition('.')[0]}, or set model.weights to pretrained",
        )
        require(bool(self.name), "model.name is empty; give one such as torchvision/resnet50")
        require(
            not self.weights.startswith("+"),
            f"model.weights is {self.weights}, with no weights before it; give a path, or pretrained",
        )

    @property
    def trained(self) -> bool:
        """Whether training starts from weights."""
        return bool(self.weights) and not self.weights.endswith(LOGITS_ONLY)

    @property
    def has_teacher(self) -> bool:
        """Whether there are weights of a whole network, that of the last layer included."""
        return bool(self.weights) and not self.weights.removesuffix(LOGITS_ONLY).endswith("+new_head")
