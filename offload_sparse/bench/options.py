"""The options of benches, apart from the benches themselves so that reading them never waits for torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from offload_sparse.config.parse import Options


@dataclass
class BenchConfig:
    """Measure one of the figures that the README quotes. Without a name: list the benches.

    Attributes:
        name: which bench; ``bench NAME --help`` lists its own options where it has some.
        quick: smaller sizes and fewer repetitions, for a look at the figures rather than a record of them.
        json: file to write the record to: command, hardware, versions, ratios and everything measured.
    """

    name: str = ""
    quick: bool = False
    json: str = ""

    def __post_init__(self) -> None:
        """Numbers are at least 0 where that is the default, else 1; shares lie in (0, 1); steps of a round
        and pairs are at least 4, where given. Of lists, this goes for every value, and only those that are
        empty by default may be."""
        for option in fields(self):
            value = getattr(self, option.name)
            values, least = value if isinstance(value, list) else [value], int(bool(option.default))
            if not values and option.default_factory is not list:
                raise ValueError(f"{option.name} is empty; give at least one")
            for number in values:
                if option.name in ("rho", "flops"):
                    if not 0 < number < 1:
                        raise ValueError(f"{option.name} is {number}; give a ratio in (0, 1), such as 0.25")
                elif option.name in ("k", "pairs") and 0 < number < 4:
                    raise ValueError(f"{option.name} is {number}; give 4 or more")
                elif isinstance(number, int | float) and number < least:
                    raise ValueError(f"{option.name} is {number}; give {least} or more")


@dataclass
class PeersConfig(BenchConfig):
    """Compare ways to train a network that is larger than the device: same model, data and batch.

    Attributes:
        model: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        width: multiplier of the channels of an ``offload_sparse/vgg…`` network, 1 for any other; 0 takes 2,
            with ``quick`` 0.5.
        k: steps of a round of ours; 0 takes 50, with ``quick`` 10.
        processes: ranks, each on a device of its own if there is CUDA.
    """

    model: str = "offload_sparse/vgg19_cifar"
    width: float = 0.0
    k: int = 0
    processes: int = 1


@dataclass
class CellsConfig(BenchConfig):
    """What benches that train many networks have in common.

    Attributes:
        data: images: a folder of parquet files or any other ``data.name``; empty takes the embedded ones.
        seeds: runs of each kind; 0 takes as many as a record has, with ``quick`` 1.
        cache: folder of the runs, which are resumed there and never run twice; empty keeps none.
        jobs: processes that train at a time, each on one thread.
    """

    data: str = ""
    seeds: int = 0
    cache: str = ""
    jobs: int = 2

    @property
    def images_name(self) -> str:
        """The end of the name of a run's folder: its images."""
        return Path(self.data or "embedded").name


@dataclass
class SetConfig(CellsConfig):
    """What benches on a set of ``cells.SETS`` have in common.

    Attributes:
        precision: ``train.precision`` of the runs; ``bf16`` takes about half the time on CPUs with AMX.
    """

    precision: Literal["no", "bf16"] = "no"
    set: str = "fashion_mnist"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data and self.set != "fashion_mnist":
            raise ValueError(f"--set {self.set} needs images; give a folder of them with --data")

    @property
    def images_name(self) -> str:
        """And the precision that they are computed in."""
        return super().images_name + ("" if self.precision == "no" else f"-{self.precision}")


@dataclass
class DFBSTBenchConfig(CellsConfig):
    """Accuracy and remaining weights of the LeNets trained dense, by DST and by DFBST.

    Attributes:
        epochs: passes over the images; 0 takes 20, with ``quick`` 150 steps.
    """

    epochs: int = 0


@dataclass
class LinksConfig(BenchConfig):
    """Two ranks on a slow link: dense DDP, ranks that talk at every step, and ranks that talk once per round.

    Attributes:
        images: of each rank in a step; 0 takes those of the network, with ``quick`` 4.
        cache: folder of the figures of each network and mode, which are not measured again; empty keeps none.
    """

    images: int = 0
    cache: str = ""


@dataclass
class StudyConfig(SetConfig):
    """Searched widths against their controls: accuracy of every method at equal train FLOPs, over seeds.

    Attributes:
        set: ``vgg19``, ``resnet20`` or ``mobilenetv1`` (CIFAR-10, accuracy on validation images), or
            ``fashion_mnist`` (a small VGG, images of 14×14).
        flops: shares of the dense network's FLOPs.
        methods: which methods, by name; empty runs all.
        epochs: passes over the images of ``even``; 0 takes those of the set, with ``quick`` 40 steps.
    """

    set: Literal["fashion_mnist", "resnet20", "mobilenetv1", "vgg19"] = "fashion_mnist"
    flops: list[float] = field(default_factory=lambda: [0.064])
    methods: list[str] = field(default_factory=list)
    epochs: int = 0


@dataclass
class FaultsConfig(BenchConfig):
    """Kills at every file-system call of short runs, once and twice, and losses of power.

    Attributes:
        cache: folder of what became of each run, none of which is made twice; empty keeps none.
    """

    cache: str = ""


@dataclass
class PretrainedConfig(SetConfig):
    """Narrow networks fine-tuned from the weights of a dense one: cuts, searches and their controls.

    Attributes:
        set: ``resnet20`` or ``vgg16`` (CIFAR-10, accuracy on validation images), or ``fashion_mnist`` (a
            small VGG, images of 14×14).
        rho: shares of the channels that are kept.
        epochs: lengths of the fine-tuning.
        dense_epochs: of the dense network; 0 takes 30, with ``quick`` 1.
        arms: which ones, by name; empty runs all.
    """

    set: Literal["fashion_mnist", "resnet20", "vgg16"] = "fashion_mnist"
    rho: list[float] = field(default_factory=lambda: [0.5, 0.25])
    epochs: list[int] = field(default_factory=lambda: [1, 3, 10])
    dense_epochs: int = 0
    arms: list[str] = field(default_factory=list)


@dataclass
class SyncBenchConfig(CellsConfig):
    """Accuracy of ranks that talk once per round beside that of ranks that talk at every step, over seeds.

    Attributes:
        images: how many to train on, and to test on.
        modes: which modes, by name; empty runs all.
        epochs: passes over the images; 0 takes 8, with ``quick`` 40 steps.
    """

    images: int = 6400
    modes: list[str] = field(default_factory=list)
    epochs: int = 0


@dataclass
class VarianceConfig(BenchConfig):
    """Variance of every estimator of the keep probabilities' gradient, on the same checkpoint of a run.

    Attributes:
        data: images: a folder of parquet files or any other ``data.name``; empty takes the embedded ones.
        model: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        rho: remaining ratio of channels.
        steps: optimizer steps before the checkpoint; 0 takes 600, with ``quick`` 20.
        pairs: pairs of masks that a variance is measured on; 0 takes 200, with ``quick`` 20.
    """

    data: str = ""
    model: str = "offload_sparse/resnet20_cifar"
    rho: float = 0.5
    steps: int = 0
    pairs: int = 0


OPTIONS: Mapping[str, type[BenchConfig]] = {
    "dfbst": DFBSTBenchConfig,
    "faults": FaultsConfig,
    "links": LinksConfig,
    "peers": PeersConfig,
    "pretrained": PretrainedConfig,
    "study": StudyConfig,
    "sync": SyncBenchConfig,
    "variance": VarianceConfig,
}
"""Benches with options of their own, which their ``run`` takes in the place of ``quick``."""


def chosen(option: str, given: list[str], known: Collection[str], usual: Collection[str]) -> list[str]:
    """Those of the ``known`` names, in their order, that ``option`` gives, or else the ``usual`` ones. Raises
    ValueError: one is not known."""
    for name in (name for name in given if name not in known):
        raise ValueError(f"{option} gives {name!r}; give some of {', '.join(known)}")
    return [name for name in known if name in (given or usual)]


def options_of(argv: Sequence[str]) -> type[BenchConfig]:
    """The configuration class of the bench that a command line names, if that has one of its own; what is the
    value of an option names none."""
    words = [token.removeprefix("--name=") for token in argv if token != "--name"]
    places = Options(BenchConfig, "", ()).places(words)
    return next((OPTIONS[place] for place in places if place in OPTIONS), BenchConfig)
